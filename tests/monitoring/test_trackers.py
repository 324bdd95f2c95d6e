"""The programs in docs/monitoring.md that send a run's scalars to trackers, with stand-ins."""

import contextlib
import json
import sys
import types
from pathlib import Path

import pytest

from tests.support.documents import python_blocks
from vit_dist.monitoring.writer import make_writer

BLOCKS = python_blocks((Path(__file__).parents[2] / "docs" / "monitoring.md").read_text())


@pytest.fixture
def run(tmp_path):
    """A run's folder with two rows, one with a value that is not finite, and half a third one."""
    folder = tmp_path / "runs" / "first"
    writer = make_writer(folder)
    writer.scalars(10, {"train/loss": 2.0, "train/grad_norm": float("nan")})
    writer.scalars(10, {"val/accuracy": 0.5})
    writer.close()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "ti')
    (folder / "config.json").write_text('{"seed": 3}')
    return folder


@pytest.fixture
def play(run, monkeypatch):
    """A function that runs a block of the page; during its second wait somebody presses Ctrl-C."""
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt
        with open(run / "metrics.jsonl", "a") as file:
            file.write('me": 1.0, "train/loss": 1.0}\n')

    monkeypatch.setattr("time.sleep", wait)
    monkeypatch.setattr("sys.argv", ["program", str(run)])
    follow = types.ModuleType("follow")
    exec(BLOCKS["follow.py"], follow.__dict__)
    monkeypatch.setitem(sys.modules, "follow", follow)

    def play(name, **tracker):
        module = types.SimpleNamespace(**tracker)
        monkeypatch.setitem(sys.modules, name.removeprefix("to_").removesuffix(".py"), module)
        exec(BLOCKS[name], {"__name__": "__main__"})

    return play


EXPECTED = [(10, {"train/loss": 2.0}), (10, {"val/accuracy": 0.5}), (20, {"train/loss": 1.0})]


def test_weights_and_biases(play):
    had, began = [], []

    @contextlib.contextmanager
    def init(**arguments):
        began.append(arguments)
        yield types.SimpleNamespace(log=lambda scalars, *, step: had.append((step, scalars)))
        began.append("finished")

    play("to_wandb.py", init=init)
    assert had == EXPECTED
    (arguments, finished) = began
    assert arguments["id"] == "first" and arguments["config"] == {"seed": 3} and finished


def test_mlflow(play):
    had, files = [], []
    play(
        "to_mlflow.py",
        start_run=lambda *, run_name: contextlib.nullcontext(),
        log_artifact=lambda path: files.append(json.loads(Path(path).read_text())),
        log_metrics=lambda scalars, *, step: had.append((step, scalars)),
    )
    assert had == EXPECTED and files == [{"seed": 3}]


def test_rows_that_a_resume_dropped_come_again(run, monkeypatch):
    """A run that logged step 20, was killed, and goes on from step 10."""
    follow = {}
    exec(BLOCKS["follow.py"], follow)
    path = run / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "time": 0, "a": n}) + "\n" for n in (10, 20)))
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 1:
            path.write_text('{"step": 10, "time": 0, "a": 10}\n')
        elif len(waits) == 2:
            with open(path, "a") as file:
                file.write('{"step": 20, "time": 9, "a": 21}\n')
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", wait)
    assert list(follow["follow"](run)) == [(10, {"a": 10}), (20, {"a": 20}), (20, {"a": 21})]
