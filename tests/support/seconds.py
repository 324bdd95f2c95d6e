"""How long each test took when that was measured last: seconds.json, which `make seconds` writes.

It tells which tests are too long for `make check`, and which files go first when processes
share the files. A test that is not in it counts as short.
"""

import collections
import json
from collections.abc import Iterable
from pathlib import Path

PATH = Path(__file__).with_name("seconds.json")
# Longer than this is slow: one case of a test, and all cases of it together.
CASE, TOGETHER = 0.3, 1.0
LEAST = 0.2  # shorter tests are not worth a line of the file


def name_of(nodeid: str) -> str:
    """tests/test_a.py::test_b, whatever the case."""
    return nodeid.partition("[")[0]


def read() -> dict[str, tuple[float, float]]:
    """Test -> seconds of its longest case, and of all its cases together."""
    return {name: tuple(found) for name, found in json.loads(PATH.read_text()).items()}


def is_slow(case: float, together: float) -> bool:
    return case > CASE or together > TOGETHER


def write(durations: Iterable[tuple[str, float]]) -> None:
    """Writes (id of a case, seconds of its set-up, call or end) of a whole run."""
    cases: collections.Counter[str] = collections.Counter()
    for nodeid, seconds in durations:
        cases[nodeid] += seconds
    tests: dict[str, list[float]] = collections.defaultdict(list)
    for nodeid, seconds in cases.items():
        tests[name_of(nodeid)].append(seconds)
    rows = [
        f'"{name}": [{max(found):.1f}, {sum(found):.1f}]'
        for name, found in sorted(tests.items())
        if sum(found) > LEAST
    ]
    PATH.write_text("{\n" + ",\n".join(rows) + "\n}\n")
