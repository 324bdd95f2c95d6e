"""A loss of power at any moment leaves a whole checkpoint on the disk.

The disk is a file with an ext4 file system, mounted through a loop device. After every operation of
the save the file is copied: that is what the platters would hold if the power went at that moment.
Each copy is mounted by itself (which replays the journal, as after a crash) and looked into.
"""

import contextlib
import os
import shutil
import subprocess

import numpy as np
import pytest

from tests.support.stepping import assert_bits
from vit_dist.storage import files
from vit_dist.training import state_file
from vit_dist.training.checkpoint import Checkpointer, open_checkpoint

MEGABYTES = 24


def arrays_of(step):
    return {"model/kernel": np.full(2**16, step, np.float32), "step": np.array(step)}


@contextlib.contextmanager
def mounted(image, folder):
    folder.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    """(file behind the disk, where it is mounted)."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(MEGABYTES * 2**20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        mount = mounted(image, tmp_path / "disk")
        mount.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a loop device cannot be mounted here ({error}); that takes root")
    try:
        yield image, tmp_path / "disk"
    finally:
        mount.__exit__(None, None, None)


def copies_after_each_operation(monkeypatch, image, disk, folder):
    """Copies the disk now and after each operation; returns the list of copies."""
    copies, fsync, open_ = [], os.fsync, os.open

    def copy():
        # The worst that the kernel may do by itself: it writes its journal, and with it the names
        # of files made and removed, while the bytes of the new files are still in its cache.
        other = open_(disk / "other", os.O_CREAT | os.O_WRONLY)
        os.pwrite(other, b"x", len(copies))
        fsync(other)
        os.close(other)
        copies.append(folder / str(len(copies)))
        shutil.copyfile(image, copies[-1])

    def copying(function):
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            copy()
            return result

        return called

    for module, name in (
        (os, "fsync"),
        (os, "unlink"),
        (os, "rmdir"),
        (os, "makedirs"),
        (files, "write_file"),
        (state_file, "write_file"),
    ):
        monkeypatch.setattr(module, name, copying(getattr(module, name)))
    copy()
    return copies


def test_a_loss_of_power_at_any_moment(tmp_path, monkeypatch, disk):
    image, folder = disk
    checkpointer = Checkpointer(folder / "run", keep=1)
    checkpointer.save(arrays_of(1), step=1, notes={})
    checkpointer.wait()
    (tmp_path / "copies").mkdir()
    copies = copies_after_each_operation(monkeypatch, image, folder, tmp_path / "copies")
    for step in (2, 3):
        checkpointer.save(arrays_of(step), step=step, notes={})
        checkpointer.wait()
    monkeypatch.undo()
    found = []
    for number, copy in enumerate(copies):
        with mounted(copy, tmp_path / f"look{number}") as look:
            newest = open_checkpoint(str(look / "run"))
            assert_bits(newest.arrays, arrays_of(newest.step))
            found.append(newest.step)
            del newest  # it keeps the file open
        copy.unlink()
    assert found == sorted(found) and set(found) == {1, 2, 3}
