"""A benchmark refuses a result of a busy machine, or of rounds that disagree."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.benchmarks import BENCHMARKS

_spec = importlib.util.spec_from_file_location("_machine", BENCHMARKS / "_machine.py")
machine = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(machine)

CPUINFO = """processor\t: 0
model name\t: AMD EPYC 7B13
flags\t\t: fpu sse2 avx2 fma sha_ni
"""


def made(*, busy, own, **options):
    """A machine of which 100 s pass, all cores together."""
    times = iter([(1000.0, 5000.0), (1000.0 + busy, 5100.0)])
    spent = iter([7.0, 7.0 + own])
    return machine.Machine(
        **{"smoke": False, **options}, busy=lambda: next(times), own=lambda: next(spent)
    )


def test_a_quiet_machine_tells_its_result(capsys):
    made(busy=95.0, own=90.0).conclude("ratio 1.50", [1.5, 1.45, 1.55])
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "ratio 1.50" and "cores" in out[0]


def test_others_that_compute():
    with pytest.raises(SystemExit, match="others had 11% of the processor, more than 10%"):
        made(busy=95.0, own=84.0).conclude("ratio")


def test_rounds_that_disagree():
    # One that is far off is an accident, two are not.
    made(busy=50.0, own=50.0).conclude("ratio", [1.0, 1.0, 1.02, 1.5, 0.99])
    with pytest.raises(SystemExit, match=re.escape("rounds disagree by 15%")):
        made(busy=50.0, own=50.0).conclude("ratio", [1.0, 1.0, 1.15, 1.5, 0.99])


def test_a_smoke_run_tells_all(capsys):
    made(busy=95.0, own=1.0, smoke=True).conclude("ratio", [1.0, 2.0, 3.0])
    assert capsys.readouterr().out.endswith("ratio\n")


@pytest.mark.parametrize("smoke", [False, True])
def test_a_result_is_kept(tmp_path, monkeypatch, smoke):
    monkeypatch.setattr(machine, "MEASURED", tmp_path / "measured.jsonl")
    monkeypatch.setattr(sys, "argv", ["benchmarks/startup.py", "--record"])
    made(busy=50.0, own=50.0, smoke=smoke, record=True).conclude("Ti/16: ratio 1.50")
    if smoke:
        assert not machine.MEASURED.exists()
        return
    row = json.loads(machine.MEASURED.read_text())
    assert (row["benchmark"], row["text"]) == ("startup", "Ti/16: ratio 1.50")
    assert row["processor"] == machine.processor() and re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])


def test_the_processor_is_named():
    assert machine.describe(CPUINFO).startswith("AMD EPYC 7B13, ")
    assert ", avx2 fma, load " in machine.describe(CPUINFO)
    assert machine.describe("").startswith("unknown processor")


def test_ticks_of_linux():
    # user nice system idle iowait irq softirq steal guest
    busy, there = machine.ticks("cpu  100 0 50 800 50 0 0 25 3\ncpu0 1 2 3\n")
    assert busy / there == pytest.approx(175 / 1025)
    busy, there = machine.ticks()
    assert 0 < busy < there


def test_own_time_has_that_of_children():
    before, times = machine.own(), os.times()
    subprocess.run([sys.executable, "-S", "-c", "sum(range(5 * 10**6))"], check=True)
    children = os.times().children_user - times.children_user
    # Nothing is lost, whatever the child took; a clock tick is 10 ms, and a difference of sums of
    # ticks is rounded.
    assert children > 0 and machine.own() - before > children - 0.005
