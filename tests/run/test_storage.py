"""Runs on storage that fails, and runs that share a workdir: what they say, and what is left."""

import errno
import os
import shutil

import pytest
from etils import epath

from tests.support.tiny import rows, without_evaluation
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


@pytest.mark.exhaustive  # a workdir without checkpoints begins anew in every other test
def test_checkpoints_moved_away_begin_the_run_anew(workdir):
    """As the message about damaged ones says."""
    shutil.move(workdir / "checkpoints", workdir / "damaged")
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


def test_a_folder_of_checkpoints_that_cannot_be_listed(workdir, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        train(config(total_steps=15), str(workdir))


def test_files_of_a_user_without_a_name(workdir):
    """As in a container that is started with a user id of its own. One checkpoint is damaged.

    The run goes on from 9, as 12 is; what is damaged takes up no place: 15 and 10 are kept, not 15
    and 12.
    """
    for path in [workdir, *workdir.rglob("*")]:
        os.chown(path, 54321, 54321)
    flip(checkpoints(workdir)[-1])
    train(without_evaluation(save_steps=5, step__ema_decay=0.9, total_steps=15), str(workdir))
    assert [path.name for path in checkpoints(workdir)] == ["000000010", "000000015"]


def test_one_run_in_a_workdir(workdir):
    """Once the lock is gone the run goes on: test_the_home_folder."""
    before = rows(workdir)
    with WorkdirLock(workdir), pytest.raises(ConfigError, match=r"in use by process \d+ on"):
        train(config(total_steps=15), str(workdir))
    assert rows(workdir) == before


def test_who_was_taken_over_does_not_save(tmp_path, monkeypatch):
    def taken(self):
        raise StorageError("the workdir was taken over")

    monkeypatch.setattr(WorkdirLock, "check", taken)
    with pytest.raises(StorageError, match="taken over"):
        train(config(total_steps=3), str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


# Of events without a run around them: tests/monitoring/test_failures.py.
@pytest.mark.parametrize("name", ["metrics", pytest.param("events", marks=pytest.mark.exhaustive)])
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


def test_the_home_folder(workdir, tmp_path, monkeypatch):
    """A run in ~ goes on, is evaluated, and is what another one begins with.

    The checkpoint that a run begins with is closed: pruned while it is open, it would take up the
    disk's room to the end of the run.
    """
    closed = []
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        patch.chdir(tmp_path)
        patch.setattr(start.Checkpoint, "close", lambda self: closed.append(self.step))
        train(config(total_steps=15), "~/run")
        assert closed == [12]
        assert evaluate(config(), "~/run", splits=["train"])["train"]["examples"] > 0
        closed.clear()
        train(config(total_steps=1, init_from="~/run"), "~/new/z")
        assert closed == [15]
    assert not (tmp_path / "~").exists()
    assert [path.name for path in checkpoints(workdir)] == ["000000012", "000000015"]
    assert [row["step"] for row in rows(workdir)] == [3, 6, 9, 12, 15]
    assert (tmp_path / "new/z/checkpoints/000000001").exists()
