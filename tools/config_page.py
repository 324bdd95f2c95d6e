"""Writes docs/config.md, the table of all config keys, from vit_dist/config/defaults.py.

python tools/config_page.py            prints the page
python tools/config_page.py --write    writes it; a test fails where it is out of date
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = ROOT / "vit_dist" / "config" / "defaults.py"
PAGE = ROOT / "docs" / "config.md"

HEAD = """# Every config key

Made from `vit_dist/config/defaults.py` by `python tools/config_page.py --write`. A config file sets
a key by `config.section.key = value`, the command line by `--config.section.key=value`. Of a
duration exactly one unit counts: what the command line gives, else the config file, else the
default. A section's title names the part of the package that reads it.
"""


def comment_of(lines: list[str], first: int, last: int) -> str:
    """The comment behind an entry's first or last line, else the comment in the line above it.

    `first` and `last` are the entry's lines, counted from 1.
    """
    # Read from the text, because the syntax tree of `ast` has no comments.
    for number in (first, last):
        found = re.search(r"\S.*?  #\s*(.+)$", lines[number - 1])
        if found:
            return found[1].strip()
    above = re.fullmatch(r"\s*#\s*(.+)", lines[first - 2])
    return above[1].strip() if above else ""


def describe(node: ast.expr) -> tuple[str, str]:
    """(default, type and range) of the expression behind a key."""
    # _number(default, interval) or _Key(default, type, interval); else a plain default.
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments = [ast.unparse(argument) for argument in node.args]
        if node.func.id == "_number":
            return arguments[0], f"{_kind(node.args[0])} in {ast.literal_eval(node.args[1])}"
        interval = f" in {ast.literal_eval(node.args[2])}" if len(arguments) > 2 else ""
        kind = {"object": "literal"}.get(arguments[1], arguments[1])
        return arguments[0], f"{kind}{interval}, or None"
    return ast.unparse(node), _kind(node)


def _kind(node: ast.expr) -> str:
    return type(ast.literal_eval(node)).__name__


def durations(node: ast.Call) -> tuple[str, str, str]:
    """(name, default, units) of a _durations(...) entry."""
    # The units that _durations in defaults.py gives each duration.
    name = ast.literal_eval(node.args[0])
    given = [f"{keyword.arg} = {ast.unparse(keyword.value)}" for keyword in node.keywords]
    units = ["steps", "epochs", "examples"]
    units += [] if name == "total" else ["percent"]
    units += ["minutes"] if name == "save" else []
    return name, ", ".join(given) or "None", " | ".join(units)


def row(*cells: str) -> str:
    """A row of a table, its bars escaped."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rows(section: ast.Dict, lines: list[str], prefix: str) -> list[str]:
    """A row for each key of a section; keys that are sections themselves are left out."""
    found = []
    for key, value in zip(section.keys, section.values, strict=True):
        if isinstance(value, ast.Dict):
            continue
        comment = comment_of(lines, (key or value).lineno, value.end_lineno or value.lineno)
        # **_durations(...) has no key of its own in the syntax tree.
        if isinstance(value, ast.Call) and key is None:
            name, default, units = durations(value)
            found.append(row(f"`{prefix}{name}_*`", f"`{default}`", f"one of {units}", comment))
        elif key is not None:
            default, kind = describe(value)
            found.append(row(f"`{prefix}{ast.literal_eval(key)}`", f"`{default}`", kind, comment))
    return found


def make_page() -> str:
    """The whole page."""
    # From the source: an imported module has no comments.
    text = DEFAULTS.read_text()
    lines = text.splitlines()
    (table,) = (
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "DEFAULTS"
    )
    assert isinstance(table, ast.Dict)
    header = ["", row("Key", "Default", "Values", ""), "|---|---|---|---|"]
    parts = [HEAD, "## A run", *header, *rows(table, lines, "")]
    for key, value in zip(table.keys, table.values, strict=True):
        if key is not None and isinstance(value, ast.Dict):
            name, reader = ast.literal_eval(key), comment_of(lines, key.lineno, key.lineno)
            parts += ["", f"## {name}: `{reader.split(';')[0]}`", *header]
            parts += rows(value, lines, f"{name}.")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(make_page())
    else:
        print(make_page(), end="")
