"""docs/benchmarks.md shows what benchmarks have recorded."""

import json

from tools.benchmarks_page import MEASURED, PAGE, make_page, make_part


def row(processor, benchmark, text, date):
    found = {"processor": processor, "benchmark": benchmark, "text": text, "date": date}
    return json.dumps(found)


def test_the_page_is_up_to_date():
    part = make_part(MEASURED.read_text().splitlines())
    assert PAGE.read_text() == make_page(PAGE.read_text(), part), (
        "run python tools/benchmarks_page.py --write"
    )
    assert part in PAGE.read_text() and "| `benchmarks/train_step.py` |" in part


def test_the_newest_of_each_counts():
    lines = [
        row("B", "startup", "Ti/16 at 224: 12 s", "2026-01-01"),
        row("A", "startup", "Ti/16 at 224: 9 s", "2026-01-02"),
        row("A", "startup", "Ti/16 at 224: 8 s: quiet", "2026-01-03"),
        row("A", "startup", "S/16 at 224: 11 s", "2026-01-01"),
    ]
    part = make_part(lines).splitlines()
    assert part[0] == "**A**" and part[4:6] == [
        "| `benchmarks/startup.py` | S/16 at 224 | 11 s | 2026-01-01 |",
        "| `benchmarks/startup.py` | Ti/16 at 224 | 8 s: quiet | 2026-01-03 |",
    ]
    assert part[7] == "**B**" and len(part) == 12
