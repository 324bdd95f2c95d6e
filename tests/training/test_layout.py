"""The newest whole checkpoint, found without TensorFlow: the one that a run would take."""

import json
import os

import numpy as np
import pytest

from vit_dist.training.checkpoint import Checkpointer, open_checkpoint
from vit_dist.training.layout import MANIFEST, STATE, newest_whole_step


@pytest.fixture
def workdir(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=3)
    for step in (10, 20, 30):
        checkpointer.save({"model/w": np.arange(step, dtype=np.float32)}, step=step, notes={})
    checkpointer.wait()
    return tmp_path


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "newest"),
    [
        (lambda folder: None, 30),
        (lambda folder: (folder / MANIFEST).unlink(), 20),
        (lambda folder: (folder / STATE).unlink(), 20),
        (lambda folder: (folder / MANIFEST).write_text('{"size"'), 20),
        (lambda folder: (folder / MANIFEST).write_text(json.dumps({"size": 1})), 20),
        (lambda folder: os.truncate(folder / STATE, 20), 20),
        (lambda folder: flip(folder / STATE), 20),
    ],
)
def test_it_is_the_one_that_a_run_takes(workdir, damage, newest):
    damage(workdir / "checkpoints" / "000000030")
    assert newest_whole_step(workdir) == open_checkpoint(str(workdir)).step == newest


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert newest_whole_step(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert newest_whole_step(str(tmp_path)) is None


def test_steps_are_compared_as_numbers(workdir):
    """From step 10^9 on names are longer."""
    checkpointer = Checkpointer(workdir)
    checkpointer.save({"model/w": np.zeros(1, np.float32)}, step=10**9, notes={})
    checkpointer.wait()
    assert newest_whole_step(workdir) == 10**9


def test_what_cannot_be_read_is_an_error(workdir):
    (workdir / "checkpoints" / "000000030" / MANIFEST).unlink()
    (workdir / "checkpoints" / "000000030" / MANIFEST).symlink_to("/proc/self/mem")  # EIO
    with pytest.raises(OSError):
        newest_whole_step(workdir)
