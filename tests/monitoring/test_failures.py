"""Metrics that cannot be written: a lost row ends the run, TensorBoard's file does not."""

import errno
import json
import os

import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_dist.config.errors import StorageError
from vit_dist.monitoring import files
from vit_dist.monitoring.writer import make_writer


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def log(workdir, *steps, first_step=0):
    with make_writer(workdir, first_step=first_step) as writer:
        for step in steps:
            writer.scalars(step, {"loss": 1.0})


@pytest.fixture
def full_disk(monkeypatch):
    """Files whose names begin so become the device that is always full."""

    def fill(beginning):
        def opened(path, mode):
            full = path.name.startswith(beginning)
            return real(epath.Path("/dev/full") if full else path, "wb" if full else mode)

        real = files.open_growing
        monkeypatch.setattr(files, "open_growing", opened)

    return fill


def test_rows_on_a_full_disk(tmp_path, full_disk):
    full_disk("metrics")
    with pytest.raises(StorageError) as error:
        log(tmp_path, 1)
    text = str(error.value)
    assert text.startswith(f"cannot write {tmp_path}/metrics.jsonl: No space left on device.")
    assert "Checkpoints are untouched; make room" in text and text.endswith("run again to resume")
    assert "gcloud" not in text


def test_closing_does_not_hide_what_ended_the_run(tmp_path, full_disk):
    """The row that the disk did not take fails again when the file is closed."""
    full_disk("metrics")
    writer = make_writer(tmp_path)
    with pytest.raises(ZeroDivisionError), writer:
        with pytest.raises(StorageError):
            writer.scalars(1, {"loss": 1.0})
        raise ZeroDivisionError


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*metrics.jsonl: Is a directory"):
        make_writer(tmp_path)


def test_tensorboard_on_a_full_disk_costs_tensorboard_only(tmp_path, full_disk, caplog):
    full_disk("events")
    log(tmp_path, 1, 2, 3)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    told = [r.getMessage() for r in caplog.records if "without TensorBoard" in r.getMessage()]
    assert len(told) == 1 and "No space left on device" in told[0]


def test_a_start_that_fails_leaves_the_metrics(tmp_path):
    """Rows after the checkpoint go when the first new one comes, not before."""
    log(tmp_path, 10, 20, 30)
    before = (tmp_path / "metrics.jsonl").read_text()
    for failing_start in (0, 10):
        with make_writer(tmp_path, first_step=failing_start) as writer:
            writer.text(0, "config", "{}")
        assert (tmp_path / "metrics.jsonl").read_text() == before
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 20, 30]
    # TensorBoard reads files by name, which begins with the second in which a start began.
    for number, path in enumerate(sorted(tmp_path.glob("events.*"), key=os.path.getmtime)):
        path.rename(tmp_path / path.name.replace("tfevents.", f"tfevents.{number}"))
    log(tmp_path, 15, first_step=10)
    assert [row["step"] for row in rows_of(tmp_path)] == [10, 15]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 15]


def test_rows_are_dropped_all_at_once(tmp_path, monkeypatch):
    """A full disk at that moment leaves the old file."""
    log(tmp_path, 10, 20, 30)
    before = (tmp_path / "metrics.jsonl").read_text()

    def full(path, parts):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("vit_dist.storage.files.write_file", full)
    with pytest.raises(StorageError, match="No space left"):
        log(tmp_path, 15, first_step=10)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    log("~/run", 1)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1]
    assert list((tmp_path / "run").glob("*tfevents*"))
