"""Who may import whom, and what no module of vit_dist may do; read from the source with `ast`."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vit_dist"
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))

# The last two lines are what the commands share.
COMMANDS = (
    *("train", "evaluate", "demo", "predict", "figures", "export", "plan"),
    *("convert", "show", "data_service"),
    *("wiring", "feed", "cli", "restore", "origins", "advice", "preemption"),
)
LIBRARY = (
    *("evaluators", "data", "training", "model", "monitoring"),
    *("config", "binding", "durations", "paths", "recipe", "strategy"),
)
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = {"train.py": 100}  # the story of a run; 60 elsewhere

# A layer and what it may import of vit_dist besides itself. Commands may import everything below
# them, and what another command offers (evaluate restores like train does).
ALLOWED = {
    **{command: {*COMMANDS, *LIBRARY} for command in COMMANDS},
    "evaluators": {"data", "training", "model", "monitoring", "strategy"},
    "data": {"paths", "strategy"},
    "training": {"model", "monitoring", "strategy"},
    "model": set(),
    "monitoring": {"paths"},
    "config": {"binding", "durations"},
    "binding": set(),
    "durations": set(),
    "paths": set(),
    "recipe": {"binding", "config"},  # what the files in configs/ share
    "strategy": set(),
}
# Files, for the one part of `model` that has to read some.
FILE_LIBRARIES = {"etils", "pathlib", "safetensors", "h5py", "tensorflow_datasets"}


def layer_of(module: str) -> str:
    """vit_dist.data.ops -> data; vit_dist itself -> ''."""
    return [*module.split("."), ""][1]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """All modules that the file imports, wherever the statement stands."""
    found = set()
    package = name_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from vit_dist import x` names the layer in the alias.
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def parametrize_modules(function):
    ids = [str(path.relative_to(ROOT)) for path in MODULES]
    return pytest.mark.parametrize("path", MODULES, ids=ids)(function)


def test_table_names_every_layer():
    layers = {layer_of(name_of(path)) for path in MODULES} - {""}
    assert layers <= set(ALLOWED), "a new layer needs a row in ALLOWED"


@parametrize_modules
def test_imports_run_downwards(path):
    layer = layer_of(name_of(path))
    internal = {m for m in imports_of(path) if m.split(".")[0] == PACKAGE}
    reached = {layer_of(module) for module in internal} & set(ALLOWED)
    if layer:
        assert reached <= ALLOWED[layer] | {layer}
    else:
        assert not reached, "vit_dist/__init__.py imports nothing, so that every import stays cheap"


@parametrize_modules
def test_config_dicts_stay_in_commands(path):
    if layer_of(name_of(path)) not in (*COMMANDS, "config", "recipe"):
        assert not {m for m in imports_of(path) if m.split(".")[0] == "ml_collections"}


@parametrize_modules
def test_only_formats_reads_files_in_model(path):
    if layer_of(name_of(path)) == "model" and path.parent.name != "formats":
        assert not {m.split(".")[0] for m in imports_of(path)} & FILE_LIBRARIES
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert "open" not in names


@parametrize_modules
def test_sizes(path):
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    limit = MAX_FUNCTION_LINES.get(str(path.relative_to(ROOT / PACKAGE)), 60)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= limit, f"{node.name} has {lines} lines"


@parametrize_modules
def test_nothing_is_left_undone(path):
    source = path.read_text()
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")
    assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not silent, f"line {node.lineno} swallows an exception"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda p: p.name)
def test_tests_are_short_enough(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


def test_no_import_touches_a_device():
    """Logical devices can be set only while TensorFlow has not looked at the real ones."""
    script = f"""
import importlib
for module in {[name_of(path) for path in MODULES]}:
    importlib.import_module(module)
import tensorflow as tf
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
assert len(tf.config.list_logical_devices("CPU")) == 2
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tests_see_four_cpus(cpus):
    import tensorflow as tf

    devices = tf.config.list_logical_devices("CPU")
    assert [device.name for device in devices] == [f"/device:{cpu}" for cpu in cpus]
