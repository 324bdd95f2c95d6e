"""One run on 2, 1 and 3 hosts in turn: the weights of the run that nobody disturbed."""

import os
import signal
import sys
from contextlib import ExitStack

import pytest

from tests.support import processes, tiny
from tests.support.clusters import environments
from vit_dist.cluster.preemption import PREEMPTED
from vit_dist.monitoring.starts import load_starts

TOTAL = 12
# Mixup and the moving average are functions of the example and the step. Dropout's masks differ
# from replica to replica, so a run with dropout is not the same on other hosts.
FLAGS = (
    f"--config={processes.TINY}",
    f"--config.total_steps={TOTAL}",
    "--config.save_steps=2",
    "--config.log_steps=1",
    "--config.data.val_split=",
    "--config.input.batch_size=24",
    "--config.model.dropout=0.0",
    "--config.mixing.mixup_alpha=0.5",
    "--config.step.ema_decay=0.9",
    "--config.schedule.name=cosine",
)
LONG = 500  # seconds; a machine that is busy otherwise takes minutes to begin


def train_until(flags, environment, step, number):
    """A host that gets a signal when it has logged a step; None for never."""
    os.environ.update(environment)
    sys.argv = ["train.py", *flags]

    from vit_dist import train
    from vit_dist.run import cli
    from vit_dist.run.loop import Loop

    def log(loop, done, tensors):
        found = before(loop, done, tensors)
        if done == step:
            # The save before it is on the disk: a kill gives no thread the time to end.
            loop.checkpointer.wait()
            os.kill(os.getpid(), number)
        return found

    before, Loop.log = Loop.log, log
    train.define_flags()
    cli.run(train.main)


def run_on(hosts, workdir, *, step=None, number=signal.SIGTERM):
    """Runs so many hosts until the last one gets the signal; returns their exit codes."""
    with ExitStack() as stack:
        started = []
        for index, environment in enumerate(environments(hosts) if hosts > 1 else [{}]):
            name = "multiworker" if hosts > 1 else "single"
            flags = [*FLAGS, f"--workdir={workdir}", f"--config.strategy.name={name}"]
            at = step if index == hosts - 1 else None
            log = workdir.parent / f"{workdir.name}-{hosts}-{index}"
            call = processes.Call(train_until, flags, environment, at, number, log=log)
            started.append(stack.enter_context(call))
        codes = [host.wait(LONG) for host in started]
    return codes, started[0].text()


TERM, KILL = signal.SIGTERM, signal.SIGKILL
# Each start: its hosts, the step after which the last one gets a signal, and what is said of the
# batch, which is cut as finely as the first start needed it.
TURNS = {
    "two, one, three": [
        (2, 3, TERM, "24 = 2 x 12"),
        # Killed in the step after the save of step 8: step 9 is trained again.
        (1, 9, KILL, "24 = 1 x 24, in 2 micro-batches each"),
        (3, None, None, "24 = 3 x 8"),
    ],
    "three, two, one, four": [
        (3, 3, TERM, "24 = 3 x 8"),
        (2, 6, TERM, "24 = 2 x 12, in 2 micro-batches each"),
        (1, 9, KILL, "24 = 1 x 24, in 3 micro-batches each"),
        (4, None, None, "24 = 4 x 6"),
    ],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that one host does alone, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_on(1, folder)[0] == [0]
    return folder


@pytest.mark.spawns
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "turns",
    [
        "two, one, three",
        pytest.param("three, two, one, four", marks=pytest.mark.exhaustive),
    ],
)
def test_hosts_come_and_go(whole, tmp_path, turns):
    parts = tmp_path / "parts"
    for hosts, step, number, batch in TURNS[turns]:
        codes, text = run_on(hosts, parts, step=step, number=number)
        ends = {TERM: [PREEMPTED] * hosts, KILL: [-KILL] * hosts, None: [0] * hosts}
        assert codes == ends[number], text
        assert batch in text and ("micro" in batch) == ("micro-batches" in text), text
    assert "resumed from step 8" in text

    tiny.assert_same(tiny.arrays(parts), tiny.arrays(whole), atol=1e-5)
    assert [row["step"] for row in tiny.rows(parts)] == list(range(1, TOTAL + 1))
    starts, counts = load_starts(parts), [hosts for hosts, *_ in TURNS[turns]]
    assert [start.hosts for start in starts] == [start.replicas for start in starts] == counts
