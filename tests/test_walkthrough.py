"""The notebook docs/walkthrough.ipynb runs from its first cell to its last, and shows what it says it shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "walkthrough.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
# All code cells in one namespace, as a kernel runs them, in a process that no other test has set up.
# The last line that is printed tells what the names hold then.
RUN = """
import json, sys
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
found = {
    "pretrained": names["pretrained"]["test_accuracy"],
    "untouched": names["untouched"]["accuracy"],
    "finetuned": names["finetuned"]["test_accuracy"],
    "before": names["similarities"](names["weights"]["pos_embedding"], 4).tolist(),
    "figure": names["figure"].size,
}
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_and_shows_what_it_says(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, NOTEBOOK], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *lines, last = done.stdout.splitlines()
    found = json.loads(last)
    assert found["untouched"] < found["pretrained"] and found["untouched"] < found["finetuned"]
    assert found["pretrained"] > 0.85 and found["finetuned"] > 0.9
    assert found["figure"] == [740, 360]
    # "in each tile the brightest spot is at the tile's own place"
    tiles = [[value for row in tile for value in row] for tile in found["before"]]
    assert [tile.index(max(tile)) for tile in tiles] == list(range(16))
    # The last cell but for words prints "a 3, seen as 3 76%, 7 10%" for each class.
    predicted = [line.split() for line in lines if ", seen as " in line]
    assert len(predicted) == 10
    assert sum(words[1].rstrip(",") == words[4] for words in predicted) >= 8


def test_what_is_stored_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 200_000
    assert not [word for word in ("/home/", "/root/", "/tmp/", "/work/") if word in text]


def test_no_cell_stored_an_error():
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
