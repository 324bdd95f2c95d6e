"""The rules of the house hold, and each of them notices what it is there for."""

import textwrap
from pathlib import Path

import pytest

from tools import house

ROOT = Path(__file__).resolve().parents[2]


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


BROKEN_BY_TESTS = {
    "another test": (
        house.check_imports_of_tests,
        "from tests.data.test_damage import broken",
        "imports tests.data.test_damage",
    ),
    "the root": (house.check_imports_of_tests, "from tests import conftest", "tests.conftest"),
    "a sleep": (house.check_waits_of_tests, "import time\ntime.sleep(1)", "test_a.py:2: sleeps"),
    "a bare sleep": (house.check_waits_of_tests, "sleep(1)", "test_a.py:1: sleeps"),
    "xfail": (house.check_waits_of_tests, "@pytest.mark.xfail\ndef f(): ...", "test_a.py:1: a"),
}


@pytest.mark.parametrize("rule, text, said", BROKEN_BY_TESTS.values(), ids=BROKEN_BY_TESTS)
def test_a_test_that_breaks_a_rule_is_named(tmp_path, rule, text, said):
    (tmp_path / "tests" / "support").mkdir(parents=True)
    (tmp_path / "tests" / "test_a.py").write_text(text)
    good = "from tests.support import processes\nfrom tests.support.tiny import make\n"
    (tmp_path / "tests" / "test_b.py").write_text(good)
    (found,) = rule(house.read_modules(tmp_path, "tests"))
    assert said in found


def test_exit_code(tmp_path, capsys):
    code = house.main(ROOT)
    assert code == 0, capsys.readouterr().out
    (tmp_path / "vit_dist").mkdir()
    (tmp_path / "vit_dist" / "misc.py").write_text("")
    assert house.main(tmp_path) == 1
    assert "FAILED" in capsys.readouterr().out
