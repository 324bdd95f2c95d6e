"""README and docs say only what is so: links, keys, names, commands and messages exist."""

import ast
import functools
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from tests.support.documents import commands_of
from vit_dist.cluster.strategy import NAMES
from vit_dist.config import finalize
from vit_dist.config.defaults import DEFAULTS
from vit_dist.data.ops.pipe import _REGISTRY, parse
from vit_dist.data.sources.open import SOURCES
from vit_dist.export import ALL_FORMATS
from vit_dist.model.posemb import METHODS
from vit_dist.run.check import check
from vit_dist.run.variants import parse_choices, product, words_of
from vit_dist.training.optimizer import NAMES as OPTIMIZERS
from vit_dist.training.schedules import NAMES as SCHEDULES
from vit_dist.training.step import JITS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
# Messages of others.
EXTERNAL = (
    "No module named 'importlib_resources'",
    "RESOURCE_EXHAUSTED",
)
# config.py, config.json, functions of config.py, --config.key=value.
NO_KEYS = {"py", "json", "get_defaults", "bind", "key", "section"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def documents() -> dict[str, str]:
    texts = {page.name: page.read_text() for page in PAGES}
    return texts | {c.name: ast.get_docstring(ast.parse(c.read_text())) or "" for c in CONFIGS}


def commands(*, starting: str) -> list:
    found = [(name, words) for name, text in documents().items() for words in commands_of(text)]
    found = [(name, words) for name, words in found if " ".join(words).startswith(starting)]
    assert found, f"no command begins with {starting!r}"
    return [pytest.param(w, id=f"{n}: {' '.join(w)[:60]}") for n, w in found]


def config_of(words: list[str]):
    """The finalised config of a command line, parsed as the commands do."""
    values = flags.FlagValues()
    paths = [re.sub(r"^(--config=)?configs/", rf"\1{ROOT}/configs/", word) for word in words]
    config_flags.DEFINE_config_file("config", flag_values=values)
    evaluate = ("splits", "evals", "features", "json", "csv")
    convert = ("short_side", "quality", "format")
    for name in ("workdir", "checkpoint", "output", "count", *evaluate, *convert):
        flags.DEFINE_string(name, None, "", flag_values=values)
    with mock.patch.object(sys, "argv", ["command", *paths]):  # ml_collections reads it there
        rest = values(sys.argv)[1:]
    assert not rest, f"not a flag: {rest}"
    overrides = config_flags.get_override_values(values["config"])
    return finalize(values["config"].value, overrides)


def first_column(page: str, title: str) -> list[str]:
    """The cells in backticks that begin the rows of the table whose head begins with `title`."""
    text = (ROOT / "docs" / page).read_text()
    tables = re.findall(rf"^\| {re.escape(title)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    assert tables, f"{page} has no table with {title!r}"
    return [c for table in tables for c in re.findall(r"^\| `([^`]+)`", table, re.M)]


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@functools.cache
def messages() -> list[str]:
    """Every string in the package with … for what varies, and the launchers' text."""
    found = [path.read_text() for path in (ROOT / "launch").glob("*.sh")]
    for path in (ROOT / "vit_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append(re.sub("…+", "…", "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pages
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in map(slug, headings), f"{link}: there is no such heading"


def test_every_page_is_reached_from_the_readme():
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in PAGES[0].read_text()


@pages
def test_keys_exist(page):
    text = page.read_text()
    names = re.findall(r"(?<![\w./])config\.([a-z]\w*(?:\.[a-z]\w*)*)", text)
    names = [name for name in names if name.split(".")[0] not in NO_KEYS]
    sections = "|".join(key for key, value in DEFAULTS.items() if isinstance(value, dict))
    names += [n for n in re.findall(rf"`((?:{sections})\.[a-z]\w*)`", text) if n[-3:] != ".py"]
    for name in names:
        known = DEFAULTS
        for part in name.split("."):
            assert isinstance(known, dict) and part in known, f"there is no key config.{name}"
            known = known[part]


@pages
def test_files_and_modules_exist(page):
    text = page.read_text()
    for name in set(re.findall(r"`([\w/]+\.(?:py|sh))`", text)) - {"utils.py"}:  # there is none
        assert (ROOT / name).exists() or (ROOT / "vit_dist" / name).exists(), name
    for module in set(re.findall(r"python -m (vit_dist(?:\.\w+)+)", text)):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for script in set(re.findall(r"launch/(\w+\.sh)", text)):
        assert (ROOT / "launch" / script).exists(), script
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.M)) <= set(targets)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    assert set(re.findall(r"\.\[(\w+)\]", text)) <= set(extras)


def test_readme_begins_with_the_two_commands():
    head = PAGES[0].read_text().splitlines()[:20]
    for command in ("make demo", "make test"):
        assert any(line.startswith(command) for line in head)


@pytest.mark.parametrize("words", commands(starting="python -m vit_dist."))
def test_python_commands_parse(words):
    module, rest = words[2], words[3:]
    if module == "vit_dist.launch":
        assert_dry_run([sys.executable, *words[1:]], place=3)
        return
    if module == "vit_dist.sweep":
        places = [i for i, word in enumerate(rest) if word == "--set"]
        variants = product([parse_choices(rest[i + 1]) for i in places])
        base = [word for i, word in enumerate(rest) if not {i, i - 1} & set(places)]
        for variant in variants:
            check(config_of([*base, *words_of(variant)]))
        return
    if module not in ("vit_dist.train", "vit_dist.evaluate", "vit_dist.convert", "vit_dist.show"):
        assert all(word.startswith("--") for word in rest)
        return
    config = config_of(rest)
    if config.data.source == "demo":
        options, _ = check(config)
        assert options.total_steps > 0


@pages
def test_config_files_shown_in_a_page_are_valid(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        if "def get_config" not in code:
            continue  # test_api.py and test_extending.py run the others
        names = {}
        exec(code, names)
        assert finalize(names["get_config"]())


@pytest.mark.parametrize("words", commands(starting="launch/"))
def test_launch_commands_parse(words):
    assert_dry_run(words)


def assert_dry_run(words, *, place=1):
    """What the launcher would start parses, too; `place` is where its flags begin."""
    # This machine is none of the hosts that documents name.
    known = ["--host_index=0"] if any(word.startswith("--hosts") for word in words) else []
    command = [*words[:place], "--dry-run", *known, *words[place:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        line = re.sub(r".*--command=cd \S+ \|\| exit; nohup |\s*>> .*", "", line)
        if "-m vit_dist.train" in line and "tpus" not in line:
            config_of(shlex.split(line.split("vit_dist.train")[1]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_say_how_to_run_them(path):
    found = [
        " ".join(words) for words in commands_of(ast.get_docstring(ast.parse(path.read_text())))
    ]
    assert any(f"vit_dist.train --config configs/{path.name}" in words for words in found)
    assert finalize(config_of([f"--config={path}"]))


def test_table_of_ops():
    parse("decode")  # registers them
    rows = (ROOT / "docs" / "pipe.md").read_text()
    where = dict(re.findall(r"^\| `(.*?\))` \|.*\| (host|device) \|$", rows, re.M))
    assert list(where) == first_column("pipe.md", "Op")
    ours = {
        f"{name}{inspect.signature(op.make)}": "device" if op.on_device else "host"
        for name, op in _REGISTRY.items()
        if op.make.__module__.startswith("vit_dist.")
    }
    assert where == ours


@pytest.mark.parametrize(
    ("page", "title", "names"),
    [
        ("data.md", "Source", SOURCES),
        ("distributed.md", "`config.strategy.name`", NAMES),
        ("finetuning.md", "Method", METHODS),
        ("finetuning.md", "Format", ALL_FORMATS),
        ("step.md", "`schedule.name`", SCHEDULES),
        ("step.md", "`optimizer.name`", OPTIMIZERS),
        ("step.md", "`step.jit`", [name for name in JITS if name != "auto"]),
    ],
)
def test_tables_are_complete(page, title, names):
    assert first_column(page, title) == list(names)


@pages
def test_tests_exist(page):
    """Those that a page names as proof."""
    for path, name in re.findall(r"`(tests/[\w/]*test_\w+\.py)(?:::(\w+))?`", page.read_text()):
        source = (ROOT / path).read_text()
        assert not name or re.search(rf"^def {name}\(", source, re.M), f"{path} has no {name}"


def test_what_to_open_exists():
    """The table "to change X, open Y": each file, and what to look for in it."""
    text = (ROOT / "docs" / "design.md").read_text()
    section = text.split("## To change X, open Y")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| `(\w+)` \|$", section, re.M)
    assert len(rows) >= 20
    for files, name in rows:
        sources = [(ROOT / path).read_text() for path in re.findall(r"`([^`]+)`", files)]
        defines = rf"^(def|class) {name}\b|^{name}\b.*=|import .*\b{name}\b"
        assert any(re.search(defines, source, re.M) for source in sources), f"{files} has no {name}"


def test_messages_are_real():
    quoted = first_column("troubleshooting.md", "Message")
    quoted += first_column("troubleshooting.md", "Symptom")
    quoted += first_column("tpu.md", "Message")
    quoted += first_column("troubleshooting.md", "Message or symptom")
    quoted += first_column("gpu.md", "Message")
    assert len(quoted) > 20
    for text in quoted:
        assert text in EXTERNAL or any(text in message for message in messages()), text


def test_faults_are_shown_by_tests():
    """Each row of the table of faults: an exit code, and one test (`test_tests_exist` finds it)."""
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| (?!Fault)(.*) \|$", text, re.M)
    rows = [re.split(r" *\| *", row) for row in rows]
    assert len(rows) > 50
    for row in rows:
        fault, _, code, shown = row
        assert code in {"", "goes on", "0", "1", "2", "42", "130", "-9"}, fault
        path, name = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", shown).groups()
        body = re.search(rf"^def {name}\(.*?(?=^def |\Z)", (ROOT / path).read_text(), re.M | re.S)[
            0
        ]
        assert set(re.findall(r"exit_code == (\d+)", body)) <= {code}, fault
