"""The markers of tests are true: derived from what their code names, and noticed while they run."""

import functools
import os
import re
import subprocess

import pytest
import tensorflow as tf

from tests.support import processes, tiny
from tests.support.kinds import MARKERS, kinds_of
from vit_dist import train as train_lib
from vit_dist.train import train


class Helper:
    def run(self):
        return processes.run("--config=x")


@functools.cache
def compiled():
    return tf.function(lambda x: x, jit_compile=True)


def quick():
    return tiny.make(seed=1), processes.TINY, subprocess_of_nothing


def subprocess_of_nothing():
    return re.compile("subprocess"), tf.function(quick, autograph=False)


KINDS = {
    "a quick one": (quick, set()),
    "subprocess": (lambda: subprocess.run(["true"]), {"spawns"}),
    "a helper's": (lambda: processes.call(quick, log="log"), {"spawns"}),
    "a helper's class": (lambda: Helper().run(), {"spawns"}),
    "jit_compile": (lambda: [compiled() for _ in range(2)], {"compiles"}),
    "a run": (lambda: train(tiny.get_config(), "folder"), {"compiles"}),
    "a run by its module": (lambda: train_lib.train(tiny.get_config(), "folder"), {"compiles"}),
    "both": (lambda: (compiled(), Helper()), {"spawns", "compiles"}),
}


@pytest.mark.parametrize("function, kinds", KINDS.values(), ids=KINDS)
def test_what_the_code_names(function, kinds):
    assert kinds_of([function], ["tmp_path"]) == kinds
    assert kinds_of([quick, function], ["bucket"]) == kinds | {"bucket"}


# What no reading of the code shows.
HIDDEN = """
import importlib
import pytest
import tensorflow as tf

def start():
    importlib.import_module("sub" + "process").run(["true"])

def compile():
    tf.function(lambda: tf.zeros(1), **{"jit" + "_compile": True})()

@pytest.fixture(scope="module")
def started():
    start()

def test_starts(): start()
def test_compiles(): compile()
def test_uses_what_has_started(started): pass
def test_uses_it_too(started): pass
def test_catches():
    try:
        start()
    finally:
        return
@pytest.mark.spawns
def test_marked(started): start()
@pytest.mark.compiles
@pytest.mark.spawns
def test_twice_marked(): start(), compile()
def test_quick(): tf.function(lambda: tf.zeros(1))()
"""


def run_pytest(path):
    os.environ["COLUMNS"] = "400"  # else the summary leaves out reasons
    raise SystemExit(pytest.main(["-rA", "-p", "tests.conftest", "-p", "no:cacheprovider", path]))


def test_what_no_marker_says_fails_the_test(tmp_path):
    path = tmp_path / "test_hidden.py"
    path.write_text(HIDDEN)
    code, text = processes.call(run_pytest, str(path), log=tmp_path / "log")
    assert code == pytest.ExitCode.TESTS_FAILED, text
    outcome = dict(re.findall(r"^(?:(?:PASSED|FAILED) .*::)(\w+)(?: - (.*))?$", text, re.M))
    spawns = f"Failed: this test {MARKERS['spawns']}: write @pytest.mark.spawns above it"
    compiles = f"Failed: this test {MARKERS['compiles']}: write @pytest.mark.compiles above it"
    assert outcome == {
        "test_starts": spawns,
        "test_compiles": compiles,
        "test_uses_what_has_started": spawns,
        "test_uses_it_too": spawns,
        "test_catches": spawns,
        "test_marked": "",
        "test_twice_marked": "",
        "test_quick": "",
    }
