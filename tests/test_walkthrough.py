"""The notebook docs/walkthrough.ipynb runs from top to bottom and shows what it says."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"


def printed(notebook: dict) -> str:
    """All that its cells print."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join(line for output in outputs for line in output.get("text", ()))


def shown(notebook: dict) -> list[Image.Image]:
    """All images that its cells show."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    found = [output["data"]["image/png"] for output in outputs if "data" in output]
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def check(notebook: dict) -> None:
    text = printed(notebook)
    accuracy = r"\s+(\d+\.\d)%"
    pretrained = float(re.search(f"^pretrained at 16 px{accuracy}", text, re.M)[1])
    untouched = float(re.search(f"^the same at 32 px, not fine-tuned{accuracy}", text, re.M)[1])
    finetuned = float(re.search(f"^fine-tuned at 32 px{accuracy}", text, re.M)[1])
    assert pretrained > 85 and finetuned > 90 and untouched < min(pretrained, finetuned)

    filters, positions = shown(notebook)
    assert filters.size == (16 * 5 * 8, 4 * 5 * 8)
    # "in each tile the brightest spot is at the tile's own place". On the left a tile has 4 x 4
    # places and a line, each 18 pixels wide.
    for row in range(4):
        for column in range(4):
            places = {
                (i, j): positions.getpixel((90 * column + 18 * j + 9, 90 * row + 18 * i + 9))
                for i in range(4)
                for j in range(4)
            }
            assert max(places, key=places.get) == (row, column)

    # "a 3, seen as 3 76%", for each class
    predicted = re.findall(r"^a (\d), seen as (\d) \d+%", text, re.M)
    assert len(predicted) == 10
    assert sum(label == seen for label, seen in predicted) >= 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_and_shows_what_it_says(tmp_path):
    command = [sys.executable, ROOT / "tools" / "run_notebook.py", NOTEBOOK, "done.ipynb"]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    check(json.loads((tmp_path / "done.ipynb").read_text()))


def test_what_is_stored_is_of_such_a_run():
    notebook = json.loads(NOTEBOOK.read_text())
    check(notebook)
    assert not re.search(r"/(home|root|tmp)/", printed(notebook))
    assert len(NOTEBOOK.read_text()) < 100_000
