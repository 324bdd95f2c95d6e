"""starts.jsonl: what is left of a start, however it ends."""

import errno
import os
import signal
import sys

import pytest

from tests.support import processes, tiny
from vit_dist.config.errors import DivergedError
from vit_dist.monitoring import files
from vit_dist.monitoring.goodput import KINDS, counted_steps, measure, table
from vit_dist.monitoring.starts import STARTS_FILE, Starts, load_starts
from vit_dist.train import train


class Clock:
    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


def make(clock, began=1000.0):
    return Starts(clock=clock, now=lambda: began + clock.now)


def test_a_start_and_what_the_next_one_makes_of_it(tmp_path):
    clock = Clock()
    killed = make(clock)
    # Not left: the process is killed in it.
    opened = killed.open(tmp_path)
    opened.__enter__()
    killed.runs_on(hosts=2, replicas=4)
    clock.now = 5.0
    killed.note(0)
    killed.spending.switch("steps")
    clock.now = 15.0
    killed.note(10)
    clock.now = 25.0
    with (tmp_path / STARTS_FILE).open("a") as file:
        file.write('{"start": 0, "began": 1000.0, "unt')  # what a kill within a write leaves

    clock.now = 40.0
    second = make(clock)
    with second.open(tmp_path):
        second.note(8)
        second.spending.switch("steps")
        clock.now = 44.0
        second.note(12)
        scalars = second.scalars()
        # 8 of the first start's 10 steps, each of 1 s, and 4 s; 15 s + 25 s between + 4 s.
        assert scalars["goodput/since_first_start"] == pytest.approx(12 / 44)
        assert scalars["goodput/running"] == pytest.approx(12 / 19)
        assert scalars["restarts"] == 1
    opened.__exit__(None, None, None)  # closes its file

    first, last = load_starts(tmp_path)[:2]
    assert (first.hosts, first.replicas, first.first_step, first.last_step) == (2, 4, 0, 10)
    assert (last.start, last.reason, last.first_step, last.last_step) == (1, "done", 8, 12)
    assert [row["lost"] for row in table([first, last])] == [2, 0]


def test_lines_of_earlier_starts_become_one_each(tmp_path):
    for _ in range(3):
        with make(Clock()).open(tmp_path) as starts:
            for step in range(20):
                starts.note(step)
    lines = (tmp_path / STARTS_FILE).read_text().splitlines()
    assert len(lines) == 2 + 22 and len(load_starts(tmp_path)) == 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DivergedError("the loss is not finite"), "DivergedError"),
        (KeyboardInterrupt(), "stopped: SIGINT"),
        (SystemExit(42), "stopped"),
    ],
)
def test_why_it_ended(tmp_path, error, reason):
    with pytest.raises(type(error)), make(Clock()).open(tmp_path) as starts:
        starts.note(1)
        raise error
    assert load_starts(tmp_path)[0].reason == reason


def test_hosts_other_than_the_chief_write_nothing(tmp_path):
    with make(Clock()).open(tmp_path, active=False) as starts:
        starts.note(1)
        assert starts.scalars()["restarts"] == 0
    assert not (tmp_path / STARTS_FILE).exists() and load_starts(tmp_path) == []


@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_storage_that_fails_is_one_warning(tmp_path, monkeypatch, caplog, when):
    def fail(file, *_):
        if when == "close":
            file._open.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = {"open": "__init__", "write": "add", "close": "close"}[when]
    monkeypatch.setattr(files.GrowingFile, name, fail)
    with make(Clock()).open(tmp_path) as starts:
        for step in range(3):
            starts.note(step)
        assert starts.scalars()["restarts"] == 0
    told = [r.getMessage() for r in caplog.records if STARTS_FILE in r.getMessage()]
    assert len(told) == 1 and "No space left on device" in told[0]


def test_a_damaged_file_costs_its_damaged_lines_only(tmp_path):
    with make(Clock()).open(tmp_path) as starts:
        starts.note(3)
    with (tmp_path / STARTS_FILE).open("ab") as file:
        file.write(b"\xff\xfe\x00 not text\n")
    with make(Clock()).open(tmp_path) as starts:
        starts.note(5)
    assert [start.last_step for start in load_starts(tmp_path)] == [3, 5]


# by the command


def kill_at(flags, step):
    """A training that is killed once it has logged a step."""
    sys.argv = ["train.py", *flags]

    from vit_dist import train as command
    from vit_dist.run import cli
    from vit_dist.run.loop import Loop

    def log(loop, done, tensors):
        found = before(loop, done, tensors)
        if done == step:
            # The save before it is on the disk: a kill gives no thread the time to end.
            loop.checkpointer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    before, Loop.log = Loop.log, log
    command.define_flags()
    cli.run(command.main)


def kinds_of_calls(monkeypatch):
    """What the time of each call of the step goes to; filled while a run in this process trains."""
    from vit_dist.run.loop import Loop

    kinds, before = [], Loop.call

    def call(loop, *args):
        spending = loop.starts.spending
        kinds.append(spending.switch("steps"))
        spending.switch(kinds[-1])
        return before(loop, *args)

    monkeypatch.setattr(Loop, "call", call)
    return kinds


def test_a_run_that_is_killed_and_goes_on(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    keys = ["total_steps=12", "log_steps=1", "save_steps=4", "eval_steps=6"]
    flags = [f"--config={processes.TINY}", *(f"--config.{key}" for key in keys)]
    log = tmp_path / "log"
    code, text = processes.call(kill_at, [*flags, f"--workdir={run}"], 7, log=log)
    assert code == -signal.SIGKILL, text

    config = tiny.make(total_steps=12, log_steps=1, save_steps=4, eval_steps=6)
    kinds = kinds_of_calls(monkeypatch)
    train(config, str(run))
    # Which of the two takes longer depends on the machine; which call counts as what does not.
    assert kinds == ["compiling"] + ["steps"] * 7
    starts = load_starts(run)
    assert [row["reason"] for row in table(starts)] == ["killed", "done"]
    assert [(s.first_step, s.last_step) for s in starts] == [(0, 7), (4, 12)]
    assert counted_steps(starts) == [4, 8] and measure(starts).lost_steps == 3
    for start in starts:
        assert (start.hosts, start.replicas) == (1, 1)
        # All time is accounted for, and what happened took some.
        assert sum(start.seconds.values()) == pytest.approx(start.until - start.began, abs=0.1)
        expected = set(KINDS) - {"input_stall", "meeting", "restoring", "profiling"}
        expected -= {"drawing", "ending"}  # a start that was killed has neither
        assert expected <= set(start.seconds)
    assert starts[1].seconds["compiling"] > 0 and starts[1].seconds["steps"] > 0
    assert {"drawing", "ending"} <= set(starts[1].seconds)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].startswith("goodput ") and shown[-1].startswith("done: ")
    assert "1 restart, 3 steps trained again; " in shown[-2]
    rows = [row for row in tiny.rows(run) if "train/loss" in row]
    assert [row["restarts"] for row in rows] == [0] * 4 + [1] * 8
    assert all(0 <= row["goodput/since_first_start"] <= row["goodput/running"] <= 1 for row in rows)


def test_a_run_that_was_asked_to_stop(tmp_path, monkeypatch):
    from vit_dist.cluster.preemption import Preemption

    monkeypatch.setattr(Preemption, "noticed", True)
    monkeypatch.setattr(Preemption, "received", "SIGTERM")
    train(tiny.without_evaluation(), str(tmp_path))
    (start,) = load_starts(tmp_path)
    assert start.reason == "stopped: SIGTERM" and start.last_step == 1
