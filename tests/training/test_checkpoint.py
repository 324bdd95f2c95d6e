"""A checkpoint is whole or not there, and the newest whole one wins."""

import errno
import json
import logging
import os
import re
import shutil
import tracemalloc
import zlib

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from tests.support.stepping import assert_bits
from vit_dist.config.errors import ConfigError, DataError, StorageError
from vit_dist.storage import errors, files
from vit_dist.training import checkpoint, state_file
from vit_dist.training.checkpoint import (
    MANIFEST,
    STATE,
    Checkpointer,
    open_checkpoint,
)

ARRAYS = {
    "model/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "model/scale": np.array(0.5, np.float32),
    "step": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "nan": np.array([np.nan, -0.0, np.inf], np.float32),
}
NOTES = {"config": {"seed": 1}, "model": {"pool": "gap"}}


def save(workdir, *steps, keep=2, arrays=None):
    checkpointer = Checkpointer(str(workdir), keep=keep)
    for step in steps:
        checkpointer.save(arrays or ARRAYS, step=step, notes={**NOTES, "at": step})
    checkpointer.wait()
    return checkpointer


def folder_of(workdir, step):
    return workdir / "checkpoints" / f"{step:09d}"


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    # A transposed array too: its memory is in another order.
    arrays = {**ARRAYS, "transposed": ARRAYS["model/kernel"].T}
    found = save(tmp_path, 7, arrays=arrays).newest()
    assert_bits(found.arrays, arrays)
    assert (found.step, found.notes) == (7, {**NOTES, "at": 7})
    assert str(found.path) == str(folder_of(tmp_path, 7))


def test_saving_does_not_hold_the_callers_dict(tmp_path):
    checkpointer, arrays = Checkpointer(str(tmp_path)), dict(ARRAYS)
    checkpointer.save(arrays, step=1, notes=NOTES)
    arrays.clear()
    assert_bits(checkpointer.newest().arrays, ARRAYS)


def test_nothing_yet(tmp_path):
    checkpointer = Checkpointer(str(tmp_path / "new"))
    assert checkpointer.newest() is None
    checkpointer.wait()
    checkpointer.poll()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("keep", "expected"), [(1, [50]), (2, [20, 50]), (3, [3, 20, 50]), (9, [1, 3, 20, 50])]
)
def test_keep(tmp_path, keep, expected):
    checkpointer = save(tmp_path, 1, 3, 20, 50, keep=keep)
    names = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert names == expected
    assert checkpointer.newest().step == 50


def test_the_newest_is_so_by_number(tmp_path):
    save(tmp_path, 999_999_999, 1_000_000_000)
    assert open_checkpoint(str(tmp_path)).step == 1_000_000_000


def test_other_things_in_the_folder_stay(tmp_path):
    save(tmp_path, 1)
    for name in ("notes.txt", "000000009.tmp"):
        (tmp_path / "checkpoints" / name).write_text("mine")
    assert save(tmp_path, 2, 3, keep=1).newest().step == 3
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"notes.txt", "000000009.tmp", "000000003"}


def test_the_same_step_again(tmp_path):
    save(tmp_path, 5)
    (folder_of(tmp_path, 5) / "stray").write_text("")
    save(tmp_path, 5, arrays={"step": np.array(5)})
    assert_bits(open_checkpoint(str(tmp_path)).arrays, {"step": np.array(5)})
    assert sorted(p.name for p in folder_of(tmp_path, 5).iterdir()) == [MANIFEST, STATE]


def test_later_steps_of_an_abandoned_run_stay_until_overtaken(tmp_path):
    save(tmp_path, 10, 20, 30, keep=3)
    (folder_of(tmp_path, 30) / MANIFEST).unlink()
    checkpointer = save(tmp_path, 25, keep=1)
    assert checkpointer.newest().step == 25  # not pruned in favour of the torn 30


# Damage


def without_manifest(folder):
    (folder / MANIFEST).unlink()


def without_state(folder):
    (folder / STATE).unlink()


def cut_state(folder):
    data = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(data[:-1])


def flipped_byte(folder):
    data = bytearray((folder / STATE).read_bytes())
    data[-10] ^= 1
    (folder / STATE).write_bytes(bytes(data))


def cut_manifest(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def change_manifest(folder, **changed):
    # As earlier versions wrote it, which had no checksum of itself.
    parsed = json.loads((folder / MANIFEST).read_text()) | changed | {"own_crc32": None}
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in parsed.items() if v is not None}))


def wrong_size(folder):
    change_manifest(folder, size=1)


def without_step(folder):
    change_manifest(folder, step=None)


def flipped_bit_of_manifest(folder):
    text = (folder / MANIFEST).read_text()
    step = json.loads(text)["step"]
    (folder / MANIFEST).write_text(text.replace(f'"step": {step}', f'"step": {step ^ 1}'))


def another_json(folder):
    (folder / MANIFEST).write_text("[1, 2]")


def no_text(folder):
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")


def state_of_another_format(folder):
    data = b"not safetensors"
    (folder / STATE).write_bytes(data)
    change_manifest(folder, size=len(data), crc32=zlib.crc32(data))


DAMAGE = {
    without_manifest: "has no manifest.json: it was not written to the end",
    without_state: "state.safetensors is missing",
    cut_state: r"is damaged: it has \d+ bytes instead of \d+",
    flipped_byte: "is damaged: its checksum differs",
    cut_manifest: "manifest.json is damaged",
    wrong_size: r"is damaged: it has \d+ bytes instead of 1$",
    without_step: r"manifest.json is damaged \('step'\)",
    flipped_bit_of_manifest: r"manifest.json is damaged \(its checksum is wrong\)",
    another_json: "manifest.json is damaged",
    no_text: "manifest.json is damaged",
    state_of_another_format: "state.safetensors is damaged",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items())
def test_the_newest_whole_one_wins(tmp_path, caplog, damage, message):
    checkpointer = save(tmp_path, 10, 20)
    damage(folder_of(tmp_path, 20))
    with caplog.at_level(logging.WARNING):
        found = checkpointer.newest()
    assert found.step == 10
    assert_bits(found.arrays, ARRAYS)
    (record,) = [r for r in caplog.records if "damaged checkpoint" in r.getMessage()]
    assert "000000020" in record.getMessage()
    assert open_checkpoint(str(tmp_path)).step == 10
    damage(folder_of(tmp_path, 10))
    # Both are gone: this is an error and not a start at step 0.
    with pytest.raises(DataError, match="none of them is whole") as error:
        checkpointer.newest()
    for words in ("000000010", "000000020", "move .*/checkpoints away", "another --workdir"):
        assert re.search(words, str(error.value))
    with pytest.raises(DataError, match=rf"no whole checkpoint at .*: .*000000020.*{message}"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items())
def test_opening_a_damaged_one_by_name(tmp_path, damage, message):
    save(tmp_path, 10)
    damage(folder_of(tmp_path, 10))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(str(folder_of(tmp_path, 10)))


def test_opening(tmp_path):
    save(tmp_path, 10, 20)
    assert open_checkpoint(str(tmp_path)).step == 20
    assert open_checkpoint(str(folder_of(tmp_path, 10))).step == 10
    with pytest.raises(ConfigError, match=r"no checkpoint at .*/nowhere: no such folder"):
        open_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no whole checkpoint at .*/empty: expected a run's"):
        open_checkpoint(str(tmp_path / "empty"))


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep_checkpoints must be 1 or more, got 0"):
        Checkpointer(str(tmp_path), keep=0)


# Failures to write


def wait(checkpointer):
    checkpointer.wait()


def save_again(checkpointer):
    checkpointer.save(ARRAYS, step=30, notes=NOTES)


def poll(checkpointer):
    checkpointer._pending.exception()  # as time would do
    checkpointer.poll()


def look_for_newest(checkpointer):
    checkpointer.newest()


@pytest.fixture
def full_disk(monkeypatch):
    """Half of the bytes of a file arrive, then there is no room."""

    def fill(name):
        def failing(path, parts):
            data = b"".join(bytes(part) for part in parts)
            write_file(path, [data[: len(data) // 2] if path.name == name else data])
            if path.name == name:
                raise OSError(errno.ENOSPC, "No space left on device")

        write_file = files.write_file
        monkeypatch.setattr(files, "write_file", failing)
        monkeypatch.setattr(state_file, "write_file", failing)

    return fill


@pytest.mark.parametrize("notice", [wait, save_again, poll, look_for_newest])
@pytest.mark.parametrize("file", ["000000020.unfinished", STATE, MANIFEST])
def test_a_full_disk(tmp_path, monkeypatch, full_disk, file, notice):
    checkpointer = save(tmp_path, 10)
    full_disk(file)
    checkpointer.save(ARRAYS, step=20, notes=NOTES)
    with pytest.raises(StorageError, match=r"not save step 20 to .*000000020: No space") as error:
        notice(checkpointer)
    assert "Earlier checkpoints are untouched; make room" in str(error.value)
    assert "gcloud" not in str(error.value)
    monkeypatch.undo()
    assert not folder_of(tmp_path, 20).exists()
    # Told once; the earlier one is there, and saving goes on when there is room.
    checkpointer.wait()
    assert checkpointer.newest().step == 10
    checkpointer.save(ARRAYS, step=20, notes=NOTES)
    assert checkpointer.newest().step == 20


def test_a_full_disk_prunes_nothing(tmp_path, full_disk):
    checkpointer = save(tmp_path, 10, keep=1)
    full_disk(STATE)
    checkpointer.save(ARRAYS, step=20, notes=NOTES)
    with pytest.raises(StorageError, match="step 20"):
        checkpointer.wait()
    assert open_checkpoint(str(tmp_path)).step == 10


def test_a_file_in_the_way(tmp_path):
    checkpointer = Checkpointer(str(tmp_path))
    (tmp_path / "checkpoints").write_text("in the way")
    checkpointer.save(ARRAYS, step=20, notes=NOTES)
    with pytest.raises(ConfigError, match=r"could not save step 20 to .*Earlier checkpoints are"):
        checkpointer.wait()
    assert (tmp_path / "checkpoints").read_text() == "in the way"


def test_poll_does_not_wait(tmp_path):
    checkpointer = save(tmp_path, 10)
    checkpointer.poll()
    checkpointer.save(ARRAYS, step=20, notes=NOTES)
    checkpointer.poll()
    checkpointer.wait()
    checkpointer.poll()
    assert checkpointer.newest().step == 20


# What cannot be read at the moment


@pytest.fixture
def attempts(monkeypatch):
    """Seconds waited for between attempts; none is really waited for."""
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    return waited


def unreadable_manifest(folder, monkeypatch):
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to("/proc/self/mem")  # the kernel's own EIO


def failing_open(error):
    def fail(folder, monkeypatch):
        def opened(path, *args, **kwargs):
            if str(path) == str(folder / STATE):
                raise error
            return real(path, *args, **kwargs)

        real = checkpoint.StateFile
        monkeypatch.setattr(checkpoint, "StateFile", opened)

    return fail


def no_listing(folder, monkeypatch):
    def listing(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "list_folder", listing)


def system_error(number):
    return failing_open(OSError(number, os.strerror(number), "/the/file"))


UNREADABLE = {
    "EIO, really": (unreadable_manifest, "000000020: Input/output error"),
    "EIO": (system_error(errno.EIO), "/the/file: Input/output error"),
    "EACCES": (system_error(errno.EACCES), "/the/file: Permission denied.*user id"),
    "ESTALE": (system_error(errno.ESTALE), "/the/file: Stale file handle"),
    "the folder": (no_listing, "checkpoints: Permission denied"),
    "503": (
        failing_open(tf.errors.UnavailableError(None, None, "HTTP response code 503 of gs://b/x")),
        "gs://b/x.*503.*does not answer for now",
    ),
    "403": (
        failing_open(tf.errors.PermissionDeniedError(None, None, "HTTP response code 403, gs://b")),
        "gs://b.*403.*credentials",
    ),
}


@pytest.mark.parametrize(("fail", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_now_is_not_taken_for_damaged(
    tmp_path, monkeypatch, attempts, fail, message
):
    checkpointer = save(tmp_path, 10, 20)
    fail(folder_of(tmp_path, 20), monkeypatch)
    for find in (checkpointer.newest, lambda: open_checkpoint(str(tmp_path))):
        attempts.clear()
        with pytest.raises(StorageError, match=message) as error:  # and not step 10
            find()
        assert attempts == [1.0, 2.0, 4.0, 8.0]
        assert "nothing older is taken in its place" in str(error.value)


def test_what_recovers_is_read(tmp_path, monkeypatch, attempts):
    checkpointer = save(tmp_path, 10)
    real, failures = checkpoint.StateFile, [errno.EIO, errno.ESTALE]

    def opened(*args):
        if failures:
            raise OSError(failures.pop(), "not now")
        return real(*args)

    monkeypatch.setattr(checkpoint, "StateFile", opened)
    assert checkpointer.newest().step == 10
    assert attempts == [1.0, 2.0]


def test_the_files_of_a_user_without_a_name(tmp_path):
    """As in a container that was started with a user id of its own."""
    save(tmp_path, 10)
    for path in tmp_path.rglob("*"):
        os.chown(path, 54321, 54321)
    assert Checkpointer(tmp_path).newest().step == 10
    assert open_checkpoint(str(tmp_path)).step == 10


# Interrupted saves, pruning


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def kill_at(monkeypatch, count):
    """Lets `count` operations on the disk be done, then kills; returns what was done."""
    done = []

    def counting(name, function):
        def called(*args, **kwargs):
            if len(done) == count:
                raise Killed
            done.append(name)
            return function(*args, **kwargs)

        return called

    for module, name in (
        (os, "open"),
        (os, "fsync"),
        (os, "unlink"),
        (os, "remove"),
        (os, "rmdir"),
        (os, "makedirs"),
        (files, "write_file"),
        (state_file, "write_file"),
    ):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return done


@pytest.mark.parametrize("before", [(), (10,), (10, 15)])
def test_a_save_killed_anywhere(tmp_path, before):
    """The newest is then the old one or the new one, and "none" only where none was whole."""
    outcomes = []
    for count in range(1000):
        workdir = tmp_path / str(count)
        save(workdir, *before)
        with pytest.MonkeyPatch.context() as patch:
            done = kill_at(patch, count)
            try:
                save(workdir, 20)
            except Killed:
                killed = True
            else:
                killed = False
        found = Checkpointer(workdir).newest()
        outcomes.append(found and found.step)
        if found is not None:
            assert_bits(found.arrays, ARRAYS)
        if not killed:
            break
        # The run starts again and saves that step over what was left.
        assert save(workdir, 20).newest().step == 20
        assert not list(workdir.rglob("*.unfinished"))
    assert len(done) > 8 and not killed
    older = before[-1] if before else None
    switched = outcomes.index(20)
    assert outcomes == [older] * switched + [20] * (len(outcomes) - switched)


def test_an_unfinished_save_is_no_loss(tmp_path, caplog):
    folder_of(tmp_path, 5).mkdir(parents=True)
    folder_of(tmp_path, 5).with_suffix(".unfinished").write_text("")
    with caplog.at_level(logging.WARNING):
        assert Checkpointer(tmp_path).newest() is None
    assert "its save was interrupted" in caplog.text and "damaged" not in caplog.text
    save(tmp_path, 4)
    assert open_checkpoint(str(tmp_path)).step == 4
    save(tmp_path, 6)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["000000004", "000000006"]


def test_damaged_ones_take_up_no_place(tmp_path):
    checkpointer = save(tmp_path, 10, 20, 30, 40, keep=4)
    flipped_byte(folder_of(tmp_path, 40))
    flipped_byte(folder_of(tmp_path, 20))
    cut_state(folder_of(tmp_path, 30))
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.newest().step == 10
    checkpointer.save(ARRAYS, step=50, notes=NOTES)
    checkpointer.wait()
    # 40 and 30 are known to be damaged; nothing has looked at every byte of 20.
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [20, 50] or kept == [10, 50]


def refuse_with(number):
    def refuse(path):
        if os.path.exists(path):
            raise OSError(number, os.strerror(number), str(path))
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    return refuse


def test_a_prune_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    checkpointer = save(tmp_path, 10, keep=1)

    monkeypatch.setattr(files.shutil, "rmtree", refuse_with(errno.EACCES))
    with caplog.at_level(logging.WARNING):
        checkpointer.save(ARRAYS, step=20, notes=NOTES)
        checkpointer.wait()
    assert "removing old checkpoints" in caplog.text and "Permission denied" in caplog.text
    assert checkpointer.newest().step == 20


def test_clean_up_that_fails_does_not_hide_why(tmp_path, monkeypatch, full_disk):
    checkpointer = save(tmp_path, 10)
    full_disk(STATE)

    monkeypatch.setattr(files.shutil, "rmtree", refuse_with(errno.EIO))
    checkpointer.save(ARRAYS, step=20, notes=NOTES)
    with pytest.raises(StorageError, match=r"could not save step 20 .* No space left"):
        checkpointer.wait()


def test_a_write_that_may_recover_is_tried_again(tmp_path, monkeypatch, attempts):
    checkpointer, failures = save(tmp_path, 10), [errno.EIO]
    real = files.sync_folder

    def sync(path):
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        real(path)

    monkeypatch.setattr(files, "sync_folder", sync)
    checkpointer.save(ARRAYS, step=20, notes=NOTES)
    assert checkpointer.newest().step == 20
    assert attempts == [1.0]


# Reading a part of the state


def with_average(workdir):
    arrays = {
        "model/kernel": np.arange(6.0, dtype=np.float32),
        "optimizer/kernel/velocity": np.ones(6, np.float32),
        "ema/kernel": np.arange(6.0, 12.0, dtype=np.float32),
        "step": np.array(7),
    }
    save(workdir, 7, arrays=arrays)
    return folder_of(workdir, 7) / STATE, arrays


def overwrite(path, array):
    """Damages the one array of the file."""
    data = path.read_bytes()
    assert data.count(array.tobytes()) == 1
    path.write_bytes(data.replace(array.tobytes(), bytes(array.nbytes)))


def test_weights_are_the_averages_where_there_are_any(tmp_path):
    _, arrays = with_average(tmp_path)
    weights = open_checkpoint(str(tmp_path), weights=True).weights()
    assert_bits({k: np.asarray(v) for k, v in weights.items()}, {"kernel": arrays["ema/kernel"]})
    assert weights["kernel"].shape == (6,)
    save(tmp_path / "plain", 7)
    weights = open_checkpoint(str(tmp_path / "plain"), weights=True).weights()
    assert_bits(
        {k: np.asarray(v) for k, v in weights.items()},
        {"kernel": ARRAYS["model/kernel"], "scale": ARRAYS["model/scale"]},
    )


def test_only_what_is_used_is_checked(tmp_path):
    path, arrays = with_average(tmp_path)
    overwrite(path, arrays["optimizer/kernel/velocity"])
    assert open_checkpoint(str(tmp_path), weights=True).step == 7
    with pytest.raises(DataError, match="its checksum differs"):
        open_checkpoint(str(tmp_path))
    overwrite(path, arrays["ema/kernel"])
    with pytest.raises(DataError, match="the checksum of ema/kernel differs"):
        open_checkpoint(str(tmp_path), weights=True)


def test_checkpoints_without_sums_of_single_arrays_are_checked_whole(tmp_path):
    """As they were before version 0.2."""
    path, arrays = with_average(tmp_path)
    change_manifest(folder_of(tmp_path, 7), arrays=None)
    assert_bits(open_checkpoint(str(tmp_path)).arrays, arrays)
    overwrite(path, arrays["optimizer/kernel/velocity"])
    with pytest.raises(DataError, match="its checksum differs"):
        open_checkpoint(str(tmp_path), weights=True)


def test_the_file_is_as_its_format_says(tmp_path):
    """The format's own library reads ours, and ours reads what that library wrote."""
    arrays = {**ARRAYS, "flags": np.array([True, False, True]), "bytes": np.arange(5, dtype="u1")}
    save(tmp_path, 7, arrays=arrays)
    path = folder_of(tmp_path, 7) / STATE
    assert_bits(safetensors.numpy.load_file(path), arrays)
    data = safetensors.numpy.save(arrays, {"note": "with metadata"})
    path.write_bytes(data)
    change_manifest(folder_of(tmp_path, 7), arrays=None, size=len(data), crc32=zlib.crc32(data))
    assert_bits(open_checkpoint(str(tmp_path)).arrays, arrays)


@pytest.mark.parametrize("entry", [{"shape": [-1, -6]}, {"shape": [7]}, {"data_offsets": [0, 999]}])
def test_a_header_that_lies_is_damage(tmp_path, entry):
    path, _ = with_average(tmp_path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["ema/kernel"] |= entry
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    path.write_bytes(data)
    change_manifest(folder_of(tmp_path, 7), size=len(data), crc32=zlib.crc32(data))
    with pytest.raises(DataError, match=r"is damaged: its header \(ema/kernel"):
        open_checkpoint(str(tmp_path))


def test_memory_stays_flat(tmp_path, monkeypatch):
    """Neither saving nor finding nor reading the weights makes a second copy of the state."""
    arrays = {f"{part}/kernel": np.ones(2**22, np.float32) for part in ("optimizer", "model")}
    monkeypatch.setattr(state_file, "_PIECE", 2**20)
    tracemalloc.start()
    try:
        save(tmp_path, 7, arrays=arrays).newest()
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 2**22  # of 2**25 bytes
        weights = open_checkpoint(str(tmp_path), weights=True).weights()
        assert np.asarray(weights["kernel"]).sum() == 2**22
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 2**24 + 2**22  # the array itself
    finally:
        tracemalloc.stop()


def test_what_is_open_outlives_its_removal(tmp_path):
    """A training run prunes while another command reads its weights."""
    save(tmp_path, 7)
    found = open_checkpoint(str(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints")
    assert_bits(found.arrays, ARRAYS)


def test_a_checkpoint_removed_while_looking(tmp_path, monkeypatch):
    """The run has a newer one by then, which is found."""
    save(tmp_path, 10)
    listed = checkpoint._folders

    def late(folder):
        found = listed(folder)
        monkeypatch.undo()
        save(tmp_path, 20, keep=1)
        return found

    monkeypatch.setattr(checkpoint, "_folders", late)
    assert open_checkpoint(str(tmp_path)).step == 20


def test_digests_tell_checkpoints_apart(tmp_path):
    one = save(tmp_path / "one", 7).newest().digest
    assert one == save(tmp_path / "again", 7).newest().digest
    other = save(tmp_path / "other", 7, arrays={"step": np.array(7)}).newest().digest
    assert len(one) == 64 and one != other


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save("~/run", 7)
    assert folder_of(tmp_path / "run", 7).exists()
    assert open_checkpoint("~/run").step == 7
