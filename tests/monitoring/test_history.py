"""What is read of a run's folder is what the run wrote."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_dist.config.errors import ConfigError
from vit_dist.monitoring.history import flatten, read_history
from vit_dist.monitoring.writer import make_writer


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


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="no run's folder"):
        read_history(tmp_path)


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}}) == {"a.b.c": 1, "a.d": [1, {"e": 2}]}
