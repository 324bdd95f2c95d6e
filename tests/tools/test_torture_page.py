"""docs/torture.md has a place for each cell, and says which were not run."""

import re

from tests.support.torture import CELLS, HOSTS, Cell
from tests.support.tortured import FAULTS, PHASES
from tools.torture import make_page


def result(cell, what="bit-equal"):
    outcome = [list(cell), what, 1.25, 1, "error: lost another worker: worker 1 (localhost:4711)"]
    return {"kind": "cell", "date": "2026-11-26", "on": "a processor", "result": outcome}


def rows_of(page):
    """(fault, host) -> what the table of the matrix says in each phase."""
    rows = [re.split(r" \| ", line.strip("| ")) for line in page.splitlines()]
    return {tuple(r[:2]): r[2:] for r in rows if len(r) == 6 and r[1] in HOSTS}


def test_what_was_not_run_is_said():
    rows = rows_of(make_page([]))
    assert {fault for fault, _ in rows} == set(FAULTS)
    shown = [cell for row in rows.values() for cell in row]
    assert shown.count("not run") == sum(not cell.senseless for cell in CELLS)


def test_what_was_run_stands_in_its_cell():
    one, other = Cell("SIGKILL", 1, "save"), Cell("SEGV", 0, "step")
    page = make_page([result(one), result(other, "began at zero")])
    rows = rows_of(page)
    assert rows["SIGKILL", "other"][PHASES.index("save")] == "= 1.2 s, 1"
    assert rows["SEGV", "chief"][PHASES.index("step")] == "began at zero 1.2 s, 1"
    assert "Measured on a processor, 2026-11-26" in page
    assert "worker 1 (localhost:PORT)" in page and "4711" not in page
