"""Two real hosts: nothing piles up in them, and one that is stuck is named."""

import json
import os
import re
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.clusters import free_addresses

LONG = 500  # seconds; a machine that is busy otherwise takes minutes to begin
FLAGS = (
    f"--config={processes.TINY}",
    "--config.total_steps=1000000",
    "--config.log_steps=20",
    # Neither host is heard of in a save, which on a fast machine is much of the time.
    "--config.save_steps=1000000",
    "--config.data.val_split=",
    "--config.model.dropout=0.0",
    "--config.strategy.name=multiworker",
)


def environments():
    workers = free_addresses(2)
    tasks = [{"type": "worker", "index": i} for i in range(2)]
    cluster = {"worker": workers}
    return workers, [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": t})} for t in tasks]


def step_of(worker):
    """The last step that it has logged."""
    return int(([0, *re.findall(r"step (\d+)/", worker.text())])[-1])


def resources_of(worker):
    """(threads, open files)"""
    proc = Path(f"/proc/{worker.pid}")
    return len(list((proc / "task").iterdir())), len(list((proc / "fd").iterdir()))


def error_of(worker):
    (message,) = [line for line in worker.text().splitlines() if line.startswith("error: ")]
    return message


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_threads_and_files_stay_as_many_and_a_stopped_host_is_named(tmp_path):
    """TensorFlow's own time-out of collectives would leave 2.4 threads a step asleep."""
    workers, environment = environments()
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(
                processes.Command(*FLAGS, f"--workdir={tmp_path}/run", log=tmp_path / str(i), env=e)
            )
            for i, e in enumerate(environment)
        ]
        chief, other = hosts
        chief.wait_for(lambda: step_of(chief) >= 60, seconds=LONG)
        before = [resources_of(host) for host in hosts]
        chief.wait_for(lambda: step_of(chief) >= 260, seconds=LONG)
        after = [resources_of(host) for host in hosts]
        for (threads, files), (threads_now, files_now) in zip(before, after, strict=True):
            assert threads_now - threads < 20 and files_now - files < 10, (before, after)

        os.kill(other.pid, signal.SIGSTOP)
        assert chief.wait(LONG) == 1
    message = error_of(chief)
    assert re.search(
        rf"lost another worker: worker 1 \({workers[1]}\), silent for \d+ s, ", message
    )
    # Heard of a second or more before it was stopped, in which a fast machine does many steps.
    heard = re.search(r"last at step (\d+) in train", message)
    assert heard and int(heard[1]) >= 60, message
    assert "Start all of them again" in message


def train_until_stuck(flags, environment):
    """A host whose main thread does not return from writing a row of metrics."""
    os.environ.update(environment)
    sys.argv = ["train.py", *flags]

    from vit_dist import train
    from vit_dist.run import cli
    from vit_dist.run.loop import Loop

    def stand_still(loop, step, tensors):
        if step >= 200:
            threading.Event().wait()
        return {}

    Loop.log = stand_still
    train.define_flags()
    cli.run(train.main)
