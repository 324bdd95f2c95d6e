"""300 command lines and config files, generated: each runs, or ends with one message and code 2."""

import json
import os

import pytest

from tests.support import processes
from tests.support.fuzz import make_cases, run_cases

COUNT = int(os.environ.get("FUZZ_COUNT", "300"))  # more, and other ones, by hand
SEED = int(os.environ.get("FUZZ_SEED", "0"))
TRAIN = bool(os.environ.get("FUZZ_TRAIN"))  # also trains where nothing is wrong: much longer
LIMIT = 60  # seconds of a command; the slowest takes two
SHARE = 50  # commands of one process


# `make test` takes one share of them, `make test-all` each.
BEGINS = [0, *(pytest.param(i, marks=pytest.mark.exhaustive) for i in range(SHARE, COUNT, SHARE))]


@pytest.mark.spawns
@pytest.mark.parametrize("begin", BEGINS)
def test_commands(begin, tmp_path):
    cases = list(enumerate(make_cases(COUNT, SEED)))[begin : begin + SHARE]
    results, log = tmp_path / "results", tmp_path / "log"
    arguments = (cases, str(tmp_path), str(results), LIMIT, TRAIN)
    with processes.Call(run_cases, *arguments, log=log) as process:
        assert process.wait(LIMIT * len(cases)) == 0, process.text()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == len(cases)
    wrong = []
    for (_, case), (_, code, said) in zip(cases, rows, strict=True):
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        fine = (code == 2 and len(errors) == 1) or (code == 0 and not errors)
        if not fine or "Traceback" in said or "in user code" in said:
            wrong.append(f"{case.module} {case.arguments}\n{case.file}-> {code}\n{said[-1500:]}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n\n".join(wrong)
    if COUNT == 300:
        assert {row[1] for row in rows} == {0, 2}  # both kinds are among them
