"""Two hosts under the supervisor suffer one fault after the other, and end with the same bits.

`make test` has a host that ends, hosts that stand still in each way, a network and a disk that
fail; `make test-all` more ways to end; `make torture` runs all on each host in each phase
(docs/torture.md).
"""

import pytest

from tests.support.torture import CELLS, PLAIN, Cell, Reference, run_chain
from tests.support.tortured import FASTER, FAULTS

CHAIN = [
    Cell("exception", 1, "save"),
    Cell("native abort", 1, "step"),
    Cell("SEGV", 0, "step"),
    Cell("SIGKILL", 0, "save"),
    Cell("GIL held", 1, "step"),
    Cell("stuck storage", 1, "step"),
    Cell("stuck collective", 0, "step"),
    Cell("network cut", 0, "step"),
    Cell("disk full", 0, "save"),
]
# Hosts that end of themselves in other ways are left to `make test-all`: the supervisor sees an
# exit code or a signal of each, and each takes a start of two hosts, which is ten CPU seconds.
FEW = [cell for cell in CHAIN if cell.fault not in ("exception", "native abort", "SEGV")]
TOTAL = 80  # steps; a start takes some eight of them until its fault
# What the hosts that are left say, or the supervisor.
SAID = {
    "exception": "worker 1 exited with code 1",
    "native abort": "worker 1 was killed by SIGABRT",
    "SEGV": "worker 0 was killed by SIGSEGV",
    "SIGKILL": "worker 0 was killed by SIGKILL",
    "stuck storage": "has stood still at step",
    "stuck collective": "has stood still at step",
    "disk full": "could not save step",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("reference"), computed=PLAIN)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chain", [FEW, pytest.param(CHAIN, marks=pytest.mark.exhaustive)])
def test_a_run_that_suffers_fault_after_fault_ends_as_an_undisturbed_one(
    reference, tmp_path, chain
):
    outcomes = run_chain(chain, reference, tmp_path / "chain", total=TOTAL)
    assert [(o.cell, o.what) for o in outcomes] == [(cell, "bit-equal") for cell in chain]
    assert all(o.restarts for o in outcomes)
    text = (tmp_path / "chain" / "supervisor-0").read_text()
    for fault in {cell.fault for cell in chain} & set(SAID):
        assert SAID[fault] in text, fault


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_restart_that_is_faster_than_the_old_chiefs_save(reference, tmp_path):
    """The other host comes back on its own machine while the chief still writes."""
    cells = [Cell(FASTER, 0, "save")]
    (outcome,) = run_chain(cells, reference, tmp_path / "chain", total=TOTAL)
    assert outcome.what == "bit-equal"
    # The save that was being written counts: both begin with it.
    text = (tmp_path / "chain" / "supervisor-0").read_text()
    assert "resumed from step 8 " in text


def test_each_fault_is_run_on_some_host_in_some_phase():
    run = [cell for cell in CELLS if not cell.senseless]
    assert {cell.fault for cell in run} == set(FAULTS)
    assert len(run) > 100
