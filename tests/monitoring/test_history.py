"""What is read of a run's folder is what the run wrote."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_dist.config.errors import ConfigError
from vit_dist.monitoring.history import flatten, read_history
from vit_dist.monitoring.writer import make_writer, was_written


def test_what_a_run_wrote(tmp_path):
    sheet = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(1, 2, 3, 3)
    with make_writer(tmp_path / "a") as writer:
        writer.scalars(4, {"train/loss": 2.0, "train/accuracy": 0.5})
        writer.images(0, "train/batch", sheet)
        writer.images(4, "train/batch", sheet + 1)
        writer.text(0, "run", "# old")
        writer.text(4, "run", "# new")
        writer.scalars(8, {"train/loss": 1.0, "val/loss": 3})
    # A resume writes an event file of its own, and a kill leaves half a line.
    with make_writer(tmp_path / "a", first_step=8) as writer:
        writer.scalars(12, {"train/loss": 0.5})
        writer.images(12, "figures/filters", sheet)
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "train/lo')
    (tmp_path / "a" / "config.json").write_text('{"seed": 1, "step": {"clip_norm": null}, "x": {}}')

    run = read_history(tmp_path / "a")
    assert run.name == "a"
    assert run.curves["train/loss"] == ([4, 8, 12], [2.0, 1.0, 0.5])
    assert run.curves["val/loss"] == ([8], [3.0])
    assert run.last == {"train/loss": 0.5, "train/accuracy": 0.5, "val/loss": 3.0}
    assert run.config == {"seed": 1, "step.clip_norm": None, "x": {}}
    assert run.texts == {"run": "# new"} and run.starts == []
    step, (png,) = run.images["train/batch"]
    assert step == 4 and set(run.images) == {"train/batch", "figures/filters"}
    np.testing.assert_array_equal(Image.open(io.BytesIO(png)), sheet[0] + 1)


def test_damaged_files_cost_what_they_held(tmp_path, caplog):
    """A run goes on after a fault of the disk in its rows, and a report is made of what is left."""
    with make_writer(tmp_path) as writer:
        for step in (4, 8, 12):
            writer.scalars(step, {"train/loss": 1.0})
    rows = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = [rows[0], b"\xff\xfe" + rows[1], b"12\n", b'{"train/loss": 2}\n', rows[2]]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(damaged))
    (tmp_path / "config.json").write_bytes(b"")
    (tmp_path / "plan.json").write_bytes(b"\xff")
    (tmp_path / "starts.jsonl").write_bytes(b"\xff\n")
    run = read_history(tmp_path)
    assert run.curves["train/loss"][0] == [4, 12]
    assert (run.config, run.plan, run.starts) == ({}, [], [])
    assert caplog.text.count("is damaged") == 2
    assert was_written(tmp_path, "train/loss", 4) and not was_written(tmp_path, "train/loss", 8)
    with make_writer(tmp_path, first_step=12) as writer:
        writer.scalars(16, {"train/loss": 1.0})
    assert read_history(tmp_path).curves["train/loss"][0] == [4, 12, 16]


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="no run's folder"):
        read_history(tmp_path)


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}}) == {"a.b.c": 1, "a.d": [1, {"e": 2}]}
