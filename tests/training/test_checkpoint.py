"""A checkpoint is whole or not there, and the newest whole one wins."""

import errno
import json
import logging
import zlib

import numpy as np
import pytest
from etils import epath

from tests.support.stepping import assert_bits
from vit_dist.training.checkpoint import MANIFEST, STATE, Checkpointer, open_checkpoint

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
    parsed = json.loads((folder / MANIFEST).read_text()) | changed
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in parsed.items() if v is not None}))


def wrong_size(folder):
    change_manifest(folder, size=1)


def without_step(folder):
    change_manifest(folder, step=None)


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
    without_state: "state.safetensors is missing or not",
    cut_state: "is missing or not [0-9]+ bytes long",
    flipped_byte: "is damaged: its checksum differs",
    cut_manifest: "manifest.json is damaged",
    wrong_size: "is missing or not 1 bytes long",
    without_step: r"manifest.json is damaged \('step'\)",
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
    assert checkpointer.newest() is None
    with pytest.raises(ValueError, match=r"no whole checkpoint at .*checkpoints/<step>/man"):
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
    with pytest.raises(ValueError, match=r"no checkpoint at .*/nowhere: no such folder"):
        open_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no whole checkpoint at .*/empty: expected a run's"):
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
    """Half of the bytes arrive, then there is no room."""

    def fill(file):
        path_class = type(epath.Path("x"))
        name = "write_bytes" if file == STATE else "write_text"
        write = getattr(path_class, name)

        def failing(self, data):
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(path_class, name, failing)

    return fill


@pytest.mark.parametrize("notice", [wait, save_again, poll, look_for_newest])
@pytest.mark.parametrize("file", [STATE, MANIFEST])
def test_a_full_disk(tmp_path, monkeypatch, full_disk, file, notice):
    checkpointer = save(tmp_path, 10)
    full_disk(file)
    checkpointer.save(ARRAYS, step=20, notes=NOTES)
    with pytest.raises(OSError, match=r"could not save step 20 to .*000000020: No space") as error:
        notice(checkpointer)
    assert error.value.errno == errno.ENOSPC
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
    with pytest.raises(OSError, match="step 20"):
        checkpointer.wait()
    assert open_checkpoint(str(tmp_path)).step == 10


def test_a_file_in_the_way(tmp_path):
    checkpointer = Checkpointer(str(tmp_path))
    (tmp_path / "checkpoints").write_text("in the way")
    checkpointer.save(ARRAYS, step=20, notes=NOTES)
    with pytest.raises(OSError, match=r"could not save step 20 to .*Earlier checkpoints are"):
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
