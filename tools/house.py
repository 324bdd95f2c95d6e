"""The rules of the house, read from the source with `ast`; `make lint` runs them.

    python tools/house.py [ROOT]     prints one line per rule, and each place that breaks it

A file at the top of vit_dist/ is a command, a folder is a part, and imports run downwards:
commands -> run -> evaluators, inspection -> data, training, monitoring -> model, cluster, config,
paths. docs/design.md has the reasons.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "vit_dist"
COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "export",
    "convert",
    "show",
    "demo",
    "data_service",
    "tpu_worker",
    "launch",
    "doctor",
    "sweep",
    "report",
    "soup",
    "figures",
    "plan",
)
SHARED = ("paths",)  # the one file at the top that is no command

# Room -> the other rooms whose modules it imports. The table is as tight as the truth: an entry
# that no module uses is reported too.
ALLOWED: dict[str, set[str]] = {
    "": {"model"},  # vit_dist/__init__.py
    "train": {
        "run",
        "training",
        "monitoring",
        "cluster",
        "storage",
        "config",
        "paths",
    },
    "evaluate": {"run", "evaluators", "cluster", "storage", "config"},
    "predict": {"run", "data", "inspection", "storage", "config"},
    "export": {"run", "model", "storage", "config", "paths"},
    "convert": {"run", "data", "monitoring", "config"},
    "show": {"run", "data", "inspection", "storage", "config"},
    "demo": {"train", "evaluate", "run", "config"},
    "data_service": {"run", "data", "config"},
    "tpu_worker": {"run", "cluster", "config"},
    "launch": {"run", "training", "cluster", "config", "paths"},
    "doctor": {"run", "cluster", "config"},
    "plan": {"run", "costs", "data", "storage", "config"},
    "soup": {"evaluate", "run", "evaluators", "training", "storage", "config", "paths"},
    "report": {"run", "inspection", "monitoring", "storage", "config", "paths"},
    "sweep": {"launch", "run", "cluster", "storage", "config", "paths"},
    "figures": {
        "run",
        "data",
        "inspection",
        "storage",
        "config",
        "paths",
    },
    "run": {
        "evaluators",
        "costs",
        "inspection",
        "data",
        "training",
        "monitoring",
        "model",
        "cluster",
        "storage",
        "config",
        "paths",
    },
    "evaluators": {"training", "cluster", "storage", "config", "paths"},
    "inspection": {"model", "config"},
    "costs": {"model", "training", "config"},
    "data": {"storage", "config", "paths"},
    "training": {"model", "cluster", "storage", "config", "paths"},
    "monitoring": {"storage", "config", "paths"},
    "model": {"config"},
    "cluster": {"config"},
    "storage": {"config", "paths"},
    "config": set(),
    "paths": {"config"},
}

# Rooms whose functions may take a ConfigDict; the rooms below them take plain arguments.
READ_CONFIGS = (*COMMANDS, "run", "config")
# Libraries that read files; in model/ only formats/ may import them.
FILE_LIBRARIES = {"etils", "pathlib", "safetensors", "h5py", "tensorflow_datasets"}
# Names of files that would say nothing about what is in them.
VAGUE_NAMES = {"utils", "util", "helpers", "misc", "common"}


class Module(NamedTuple):
    """A Python file of the package."""

    path: Path  # as it is shown
    name: str  # dotted
    source: str
    tree: ast.Module
    nodes: list[ast.AST]  # of the tree, walked once
    imports: set[str]  # dotted names, wherever the statement stands

    @property
    def room(self) -> str:
        """vit_dist.data.ops.pipe -> data; vit_dist.train -> train; vit_dist itself -> ""."""
        # The "" at the end is for vit_dist itself, which has no second part.
        return [*self.name.split("."), ""][1]


def read_modules(root: Path, folder: str = PACKAGE) -> list[Module]:
    """All modules below `root`/`folder`: those of the package, or the tests."""
    modules = []
    for path in sorted((root / folder).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text()
        tree = ast.parse(source)
        nodes = list(ast.walk(tree))
        shown = path.relative_to(root)
        modules.append(Module(shown, name, source, tree, nodes, imports_of(nodes)))
    return modules


def imports_of(nodes: Iterable[ast.AST]) -> set[str]:
    """Dotted names that a module's syntax imports."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from vit_dist import x` names the module in the alias.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def arrows(modules: list[Module]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    known = {module.name for module in modules}
    found = {}
    for module in modules:
        names = {n for n in module.imports if n.split(".")[0] == PACKAGE}
        # `from vit_dist.train import train` imports the module vit_dist.train.
        reached = {n if n in known else n.rpartition(".")[0] for n in names}
        found[module.name] = reached & known - {module.name}
    return found


def check_rooms(modules: list[Module]) -> Iterator[str]:
    """A file at the top of the package is a command, with main() and script()."""
    for module in modules:
        top = len(module.path.parts) == 2 and module.path.stem != "__init__"
        if top and module.room not in (*COMMANDS, *SHARED):
            yield f"{module.path}: a file at the top is a command; move it into a folder"
        if top and module.room in COMMANDS:
            defined = {n.name for n in module.tree.body if isinstance(n, ast.FunctionDef)}
            for needed in sorted({"main", "script"} - defined):
                yield f"{module.path}: a command has a function {needed}()"
        if module.path.stem in VAGUE_NAMES:
            yield f"{module.path}: a name that says nothing"


def check_table(modules: list[Module]) -> Iterator[str]:
    """Imports are those of ALLOWED, all of them used."""
    truth: dict[str, set[str]] = {}
    for name, reached in arrows(modules).items():
        room = [*name.split("."), ""][1]
        truth.setdefault(room, set()).update({[*n.split("."), ""][1] for n in reached} - {room, ""})
    for room, reached in sorted(truth.items()):
        allowed = ALLOWED.get(room, set())
        for extra in sorted(reached - allowed):
            yield f"{room or PACKAGE} imports {extra}, which the table in tools/house.py forbids"
        for unused in sorted(allowed - reached):
            yield f"{room} does not import {unused}: take it out of the table in tools/house.py"
    for room in sorted(set(ALLOWED) - set(truth)):
        yield f"there is no room {room}: take its row out of the table in tools/house.py"


def check_circles(modules: list[Module]) -> Iterator[str]:
    """No module imports itself by way of others."""
    graph = arrows(modules)
    # Modules from which every path has been walked already, without a circle.
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> Iterator[str]:
        if name in path:
            yield "a circle of imports: " + " -> ".join((*path[path.index(name) :], name))
        elif name not in done:
            for other in sorted(graph[name]):
                yield from visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        yield from visit(name, ())


def check_hidden_imports(modules: list[Module]) -> Iterator[str]:
    """Modules of the package are imported at the top, where a reader sees them."""
    for module in modules:
        # Two ways to hide a circle of imports: under TYPE_CHECKING, and inside a function.
        for node in module.nodes:
            if isinstance(node, ast.Name) and node.id == "TYPE_CHECKING":
                yield f"{module.path}:{node.lineno}: TYPE_CHECKING hides a circle of imports"
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for inner in ast.walk(node):
                names = []
                if isinstance(inner, ast.Import):
                    names = [alias.name for alias in inner.names]
                elif isinstance(inner, ast.ImportFrom):
                    names = [inner.module or PACKAGE]
                if any(name.split(".")[0] == PACKAGE for name in names):
                    yield f"{module.path}:{inner.lineno}: an import in a function hides a circle"


def check_config_dicts(modules: list[Module]) -> Iterator[str]:
    """Below run/ no function takes a ConfigDict."""
    for module in modules:
        libraries = {name.split(".")[0] for name in module.imports}
        if module.room not in READ_CONFIGS and "ml_collections" in libraries:
            yield f"{module.path}: reads a ConfigDict; take plain arguments"


def check_files_in_model(modules: list[Module]) -> Iterator[str]:
    """In model/ only formats/ reads files."""
    for module in modules:
        if module.room != "model" or "formats" in module.path.parts:
            continue
        # `open` needs no import, so the built-in is looked for by its name.
        libraries = {name.split(".")[0] for name in module.imports}
        names = {node.id for node in module.nodes if isinstance(node, ast.Name)}
        if libraries & FILE_LIBRARIES or "open" in names:
            yield f"{module.path}: reads files; that belongs into model/formats"


def check_nothing_left_undone(modules: list[Module]) -> Iterator[str]:
    """No marks of unfinished work, no exception swallowed, no line squeezed past the formatter."""
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b|# fmt: skip")
    for module in modules:
        for number, line in enumerate(module.source.splitlines(), 1):
            if marks.search(line):
                yield f"{module.path}:{number}: {line.strip()}"
        for node in module.nodes:
            if isinstance(node, ast.ExceptHandler) and all(
                isinstance(statement, ast.Pass) for statement in node.body
            ):
                yield f"{module.path}:{node.lineno}: swallows an exception"


def check_imports_of_tests(tests: list[Module]) -> Iterator[str]:
    """A test imports helpers from tests/support, and nothing from another test."""
    for module in tests:
        names = {name for name in module.imports if name.split(".")[0] == "tests"}
        for name in sorted(n for n in names if not f"{n}.".startswith("tests.support.")):
            yield f"{module.path}: imports {name}; move what both need into tests/support"


def check_waits_of_tests(tests: list[Module]) -> Iterator[str]:
    """Tests wait for something, not for a time, and none is expected to fail."""
    for module in tests:
        for node in module.nodes:
            name = getattr(node, "attr", getattr(node, "id", ""))
            if name == "sleep":
                yield f"{module.path}:{node.lineno}: sleeps; wait_for() of tests/support/waiting.py"
            if name == "xfail":
                yield f"{module.path}:{node.lineno}: a test that fails is mended or taken out"


RULES: tuple[Callable[[list[Module]], Iterator[str]], ...] = (
    check_rooms,
    check_table,
    check_circles,
    check_hidden_imports,
    check_config_dicts,
    check_files_in_model,
    check_nothing_left_undone,
)
TEST_RULES: tuple[Callable[[list[Module]], Iterator[str]], ...] = (
    check_imports_of_tests,
    check_waits_of_tests,
)


def main(root: Path) -> int:
    """Prints each rule and what breaks it; returns the exit code."""
    modules, tests = read_modules(root), read_modules(root, "tests")
    failures = 0
    for rule in (*RULES, *TEST_RULES):
        found = list(rule(tests if rule in TEST_RULES else modules))
        failures += len(found)
        print(f"{'FAILED' if found else 'ok    '} {(rule.__doc__ or '').splitlines()[0]}")
        for line in found:
            print(f"         {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1]
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else here))
