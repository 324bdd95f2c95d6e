"""docs/api.md: its blocks run, one after the other, as a notebook's cells would."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.documents import python_blocks

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"


@pytest.mark.compiles
def test_the_page_runs(tmp_path, capsys):
    image = tmp_path / "digit.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(image)
    cells = {"workdir": str(tmp_path / "run"), "image": str(image)}
    for number, code in python_blocks(PAGE.read_text()).items():
        exec(compile(code, f"{PAGE.name} block {number}", "exec"), cells)
    assert cells["metrics"]["loss"] > 0 and int(cells["state"].step.numpy()) == 5
    assert cells["features"].shape == (4, 32)
    printed = capsys.readouterr().out
    assert f"{image} [" in printed and "(4, 32) (4, 10)" in printed
