"""Runs that are killed, stopped, starved of disk, or lose a worker: what is left, and going on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest

from vit_dist.training.checkpoint import MANIFEST, STATE, open_checkpoint

ROOT = Path(__file__).resolve().parents[1]
ENDLESS = 10**6  # steps: such a run ends when it is told to
PREEMPTED = 42


def flags_of(workdir, total_steps, *more):
    flags = (f"--config={processes.TINY}", f"--workdir={workdir}")
    often = ("--config.save_steps=5", "--config.log_steps=5", "--config.data.val_split=")
    return [*flags, f"--config.total_steps={total_steps}", *often, *more]


def steps_saved(workdir):
    """Of the checkpoints that were written to the end, the oldest first."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(path.parent.name) for path in folder.glob(f"*/{MANIFEST}"))


def message_of(text):
    messages = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(messages) == 1, text[-3000:]
    assert "Traceback" not in text
    return messages[0]


def assert_equal_runs(one, other, tolerance=0.0):
    one, other = open_checkpoint(str(one)), open_checkpoint(str(other))
    assert one.step == other.step and set(one.arrays) == set(other.arrays)
    for name, array in one.arrays.items():
        np.testing.assert_allclose(
            array, other.arrays[name], rtol=0, atol=tolerance, err_msg=name
        )


# one process

ONE = ("--config.step.ema_decay=0.9", "--config.model.attention_dropout=0.1")


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """SIGKILL, a torn checkpoint, SIGTERM, in turn; then to the end, and the same undisturbed."""
    folder = tmp_path_factory.mktemp("history")
    run, facts = folder / "run", {}
    with processes.Command(*flags_of(run, ENDLESS, *ONE), log=folder / "killed") as command:
        command.wait_for(lambda: len(steps_saved(run)) >= 2)
        os.kill(command.pid, signal.SIGKILL)
        facts["killed"] = command.wait(), command.text()

    facts["older"], facts["torn"] = steps_saved(run)[-2:]
    state = run / "checkpoints" / f"{facts['torn']:09d}" / STATE
    os.truncate(state, state.stat().st_size // 2)

    with processes.Command(*flags_of(run, ENDLESS, *ONE), log=folder / "stopped") as command:
        command.wait_for(lambda: "resumed" in command.text() and "step " in command.text())
        command.wait_for(lambda: steps_saved(run)[-1] > facts["torn"])
        shutil.copytree(run, folder / "half")  # for the test of a full disk
        os.kill(command.pid, signal.SIGTERM)
        facts["stopped"] = command.wait(), command.text()
    facts["stopped_at"] = steps_saved(run)[-1]

    total = facts["stopped_at"] + 7
    with (
        processes.Command(*flags_of(run, total, *ONE), log=folder / "ended") as ended,
        processes.Command(*flags_of(folder / "whole", total, *ONE), log=folder / "log") as whole,
    ):
        facts["ended"] = ended.wait(), ended.text()
        facts["whole"] = whole.wait(), whole.text()
    return folder, facts
