"""Writes what benchmarks printed with --record into docs/benchmarks.md, by processor.

python tools/benchmarks_page.py            prints that part
python tools/benchmarks_page.py --write    writes it; a test fails where it is out of date
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURED, PAGE = ROOT / "benchmarks" / "measured.jsonl", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- from benchmarks/measured.jsonl -->\n", "<!-- until here -->\n"


def make_part(lines: list[str]) -> str:
    """A table for each processor, with the newest result of each benchmark and subject.

    Args:
      lines: of measured.jsonl, oldest first. A result's subject is its text up to the first colon.
    """
    newest = {}
    for line in lines:
        row = json.loads(line)
        subject, _, result = row["text"].partition(": ")
        newest[row["processor"], row["benchmark"], subject] = (result, row["date"])
    parts = []
    for processor in sorted({key[0] for key in newest}):
        parts += [
            f"**{processor}**",
            "",
            "| Benchmark | Of | Printed | Date |",
            "|---|---|---|---|",
        ]
        parts += [
            f"| `benchmarks/{benchmark}.py` | {subject} | {result} | {date} |"
            for (on, benchmark, subject), (result, date) in sorted(newest.items())
            if on == processor
        ]
        parts.append("")
    return "\n".join(parts)


def make_page(page: str, part: str) -> str:
    """The page with another part between BEGIN and END."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{part}{END}{after}"


if __name__ == "__main__":
    found = make_part(MEASURED.read_text().splitlines())
    if "--write" in sys.argv:
        PAGE.write_text(make_page(PAGE.read_text(), found))
    else:
        print(found)
