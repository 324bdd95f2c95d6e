"""The rules of the house hold, and each of them notices what it is there for."""

import textwrap
from pathlib import Path

import pytest

from tools import house

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert list(rule(house.read_modules(ROOT))) == []


COMMAND = "def main(): ...\ndef script(): ...\n"
# rule: (files of a package that breaks it, what the rule says)
BROKEN = {
    "a part at the top": (house.check_rooms, {"wiring.py": ""}, "wiring.py: a file at the top"),
    "no script": (house.check_rooms, {"train.py": "def main(): ..."}, "has a function script"),
    "a vague name": (house.check_rooms, {"data/utils.py": ""}, "says nothing"),
    "upwards": (
        house.check_table,
        {"data/a.py": "from vit_dist.training.b import c", "training/b.py": ""},
        "data imports training",
    ),
    "unused": (house.check_table, {"demo.py": COMMAND}, "demo does not import train"),
    "a circle of two": (
        house.check_circles,
        {"data/a.py": "from vit_dist.data import b", "data/b.py": "import vit_dist.data.a"},
        "vit_dist.data.a -> vit_dist.data.b -> vit_dist.data.a",
    ),
    "in a function": (
        house.check_hidden_imports,
        {"data/a.py": "def f():\n    from vit_dist.data import b"},
        "a.py:2: an import in a function",
    ),
    "only for types": (
        house.check_hidden_imports,
        {"data/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING: import b"},
        "TYPE_CHECKING",
    ),
    "a ConfigDict": (
        house.check_config_dicts,
        {"data/a.py": "from ml_collections import ConfigDict"},
        "reads a ConfigDict",
    ),
    "a file in model": (house.check_files_in_model, {"model/a.py": "open(1)"}, "reads files"),
    "unfinished": (house.check_nothing_left_undone, {"data/a.py": "# " + "TODO"}, "a.py:1"),
    "swallowed": (
        house.check_nothing_left_undone,
        {"data/a.py": "try:\n    f()\nexcept ValueError:\n    pass"},
        "a.py:3: swallows",
    ),
}


@pytest.mark.parametrize("rule, files, said", BROKEN.values(), ids=BROKEN)
def test_what_breaks_a_rule_is_named(tmp_path, rule, files, said):
    for name, text in files.items():
        path = tmp_path / "vit_dist" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    found = list(rule(house.read_modules(tmp_path)))
    assert any(said in line for line in found), found


def test_exit_code(tmp_path, capsys):
    assert house.main(ROOT) == 0
    (tmp_path / "vit_dist").mkdir()
    (tmp_path / "vit_dist" / "misc.py").write_text("")
    assert house.main(tmp_path) == 1
    assert "FAILED" in capsys.readouterr().out
