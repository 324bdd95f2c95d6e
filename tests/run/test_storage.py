"""Runs on storage that fails, and runs that share a workdir: what they say, and what is left."""

import errno
import os
import shutil

import pytest
from etils import epath

from tests.support.tiny import arrays, assert_same, rows, without_evaluation
from vit_dist.config.errors import ConfigError, DataError, StorageError
from vit_dist.evaluate import evaluate
from vit_dist.monitoring import files
from vit_dist.run import start
from vit_dist.storage import errors
from vit_dist.storage.lock import LOCK_FILE, WorkdirLock
from vit_dist.train import train
from vit_dist.training.checkpoint import MANIFEST, STATE


def config(**changed):
    return without_evaluation(save_steps=3, log_steps=3, step__ema_decay=0.9, **changed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps, of which the checkpoints 9 and 12 are kept."""
    workdir = tmp_path_factory.mktemp("trained")
    train(config(), str(workdir))
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy, to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(errors, "WAITS", ())


def checkpoints(workdir):
    return sorted((workdir / "checkpoints").iterdir())


def flip(folder):
    data = bytearray((folder / STATE).read_bytes())
    data[-10] ^= 1
    (folder / STATE).write_bytes(bytes(data))


def test_a_run_leaves_no_lock_and_nothing_unfinished(trained):
    assert not (trained / LOCK_FILE).exists()
    assert [path.name for path in checkpoints(trained)] == ["000000009", "000000012"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "checksum differs"),
        (lambda folder: (folder / STATE).unlink(), "state.safetensors is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "has no manifest.json"),
        (lambda folder: os.truncate(folder / STATE, 100), "has 100 bytes instead of"),
    ],
    ids=["flipped", "no state", "no manifest", "cut"],
)
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(workdir, damage, words):
    before = rows(workdir)
    for folder in checkpoints(workdir):
        damage(folder)
    with pytest.raises(DataError) as error:
        train(config(total_steps=15), str(workdir))
    for word in ("000000009", "000000012", words, "another --workdir", "checkpoints away"):
        assert word in str(error.value)
    assert error.value.exit_code == 2
    assert rows(workdir) == before and not (workdir / LOCK_FILE).exists()
    shutil.move(workdir / "checkpoints", workdir / "damaged")  # as the message says
    assert train(config(total_steps=3), str(workdir))["step"] == 3
    assert [row["step"] for row in rows(workdir)] == [3]


def test_a_run_whose_checkpoint_cannot_be_read_does_not_begin_anew(workdir):
    """The newest gives an I/O error; the older one is whole, and not taken."""
    before = rows(workdir)
    manifest = checkpoints(workdir)[-1] / MANIFEST
    manifest.rename(workdir / "kept")
    manifest.symlink_to("/proc/self/mem")  # reading it gives the kernel's own EIO
    for fail in (
        lambda: train(config(total_steps=15), str(workdir)),
        lambda: evaluate(config(), str(workdir), splits=["train"]),
    ):
        with pytest.raises(StorageError, match=r"cannot read .*000000012: Input/output") as error:
            fail()
        assert error.value.exit_code == 1
    assert rows(workdir) == before
    manifest.unlink()
    (workdir / "kept").rename(manifest)
    assert train(config(total_steps=15), str(workdir))["step"] == 15
    assert [row["step"] for row in rows(workdir)] == [3, 6, 9, 12, 15]


def test_a_folder_of_checkpoints_that_cannot_be_listed(workdir, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        train(config(total_steps=15), str(workdir))


def test_files_of_a_user_without_a_name(workdir):
    """As in a container that is started with a user id of its own."""
    for path in [workdir, *workdir.rglob("*")]:
        os.chown(path, 54321, 54321)
    assert train(config(total_steps=15), str(workdir))["step"] == 15


def test_what_is_damaged_takes_up_no_place(workdir):
    """The run goes on from 9, as 12 is damaged; at 15 it keeps 15 and 10, not 15 and 12."""
    flip(checkpoints(workdir)[-1])
    train(without_evaluation(save_steps=5, step__ema_decay=0.9, total_steps=15), str(workdir))
    assert [path.name for path in checkpoints(workdir)] == ["000000010", "000000015"]


def test_the_checkpoint_to_begin_with_is_closed(trained, tmp_path, monkeypatch):
    """Pruned while it is open, it would take up the disk's room to the end of the run."""
    shutil.copytree(trained, tmp_path / "run")
    closed = []
    monkeypatch.setattr(start.Checkpoint, "close", lambda self: closed.append(self.step))
    train(config(total_steps=13), str(tmp_path / "run"))
    train(config(init_from=str(trained), total_steps=1), str(tmp_path / "new"))
    assert closed == [12, 12]


def test_resumed_to_the_bit(trained, workdir, tmp_path):
    train(config(total_steps=15), str(workdir))
    train(config(total_steps=15), str(tmp_path / "whole"))
    assert_same(arrays(workdir), arrays(tmp_path / "whole"))


def test_one_run_in_a_workdir(workdir):
    before = rows(workdir)
    with WorkdirLock(workdir), pytest.raises(ConfigError, match=r"in use by process \d+ on"):
        train(config(total_steps=15), str(workdir))
    assert rows(workdir) == before
    train(config(total_steps=13), str(workdir))


def test_who_was_taken_over_does_not_save(tmp_path, monkeypatch):
    def taken(self):
        raise StorageError("the workdir was taken over")

    monkeypatch.setattr(WorkdirLock, "check", taken)
    with pytest.raises(StorageError, match="taken over"):
        train(config(total_steps=3), str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ["metrics", "events"])
def test_a_disk_that_is_full_for_one_file(tmp_path, monkeypatch, caplog, name):
    """A lost row of metrics ends the run; TensorBoard's events are a copy of them."""

    def opened(path, mode):
        full = path.name.startswith(name)
        return real(epath.Path("/dev/full") if full else path, "wb" if full else mode)

    real = files.open_growing
    monkeypatch.setattr(files, "open_growing", opened)
    if name == "events":
        assert train(config(total_steps=3), str(tmp_path))["step"] == 3
        assert caplog.text.count("going on without TensorBoard") == 1
        return
    with pytest.raises(StorageError, match="No space left on device") as error:
        train(config(total_steps=3), str(tmp_path))
    assert "Checkpoints are untouched; make room on that disk" in str(error.value)
    assert "gcloud" not in str(error.value)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(config(total_steps=3), "~/runs/x")
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "runs/x/checkpoints/000000003").exists()
    assert (tmp_path / "runs/x/metrics.jsonl").exists()
    metrics = evaluate(config(), "~/runs/x", splits=["train"])
    assert metrics["train"]["examples"] > 0
    train(config(total_steps=1, init_from="~/runs/x"), str(tmp_path / "z"))
