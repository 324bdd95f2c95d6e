"""Runs that are killed, stopped, starved of disk, or lose a worker: what is left, and going on."""

import os
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.support import processes, tiny
from tests.support.engines import tf_config
from vit_dist.training.checkpoint import MANIFEST, STATE, open_checkpoint

ENDLESS = 10**6  # steps: such a run ends when it is told to
PREEMPTED = 42


def flags_of(workdir, total_steps, *more):
    flags = (f"--config={processes.TINY}", f"--workdir={workdir}")
    often = (
        "--config.save_steps=5",
        "--config.log_steps=5",
        "--config.data.val_split=",
        "--config.data.test_split=test",
    )
    return [*flags, f"--config.total_steps={total_steps}", *often, *more]


def steps_saved(workdir):
    """Of the checkpoints that were written to the end, the oldest first."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(path.parent.name) for path in folder.glob(f"*/{MANIFEST}"))


def message_of(text):
    messages = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(messages) == 1, text[-3000:]
    assert "Traceback" not in text
    return messages[0]


def assert_equal_runs(one, other, tolerance=0.0):
    one, other = open_checkpoint(str(one)), open_checkpoint(str(other))
    assert one.step == other.step and set(one.arrays) == set(other.arrays)
    for name, array in one.arrays.items():
        np.testing.assert_allclose(array, other.arrays[name], rtol=0, atol=tolerance, err_msg=name)


# one process

ONE = (
    "--config.step.ema_decay=0.9",
    "--config.model.dropout=0.1",
    "--config.model.attention_dropout=0.1",
)


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """SIGKILL, a torn checkpoint, SIGTERM, in turn; then to the end, and the same undisturbed."""
    folder = tmp_path_factory.mktemp("history")
    run, facts = folder / "run", {}
    with processes.Command(*flags_of(run, ENDLESS, *ONE), log=folder / "killed") as command:
        command.wait_for(lambda: len(steps_saved(run)) >= 2)
        os.kill(command.pid, signal.SIGKILL)
        facts["killed"] = command.wait(), command.text()

    facts["older"], facts["torn"] = steps_saved(run)[-2:]
    state = run / "checkpoints" / f"{facts['torn']:09d}" / STATE
    os.truncate(state, state.stat().st_size // 2)

    with processes.Command(*flags_of(run, ENDLESS, *ONE), log=folder / "stopped") as command:
        command.wait_for(lambda: steps_saved(run)[-1] > facts["torn"])
        os.kill(command.pid, signal.SIGTERM)
        facts["stopped"] = command.wait(), command.text()
    facts["stopped_at"] = steps_saved(run)[-1]
    shutil.copytree(run, folder / "half")

    total = facts["stopped_at"] + 7
    with (
        processes.Command(*flags_of(run, total, *ONE), log=folder / "ended") as ended,
        processes.Command(*flags_of(folder / "whole", total, *ONE), log=folder / "log") as whole,
    ):
        facts["ended"] = ended.wait(), ended.text()
        facts["whole"] = whole.wait(), whole.text()
    return folder, facts


def test_a_killed_run_is_not_lost(history):
    _, facts = history
    assert facts["killed"][0] == -signal.SIGKILL


def test_a_torn_checkpoint_is_passed_over(history):
    folder, facts = history
    text = facts["stopped"][1]
    # There may be a second warning, of one that was being written when the run was killed.
    warnings = [line for line in text.splitlines() if "passing over a damaged" in line]
    assert any(f"{facts['torn']:09d}/{STATE}" in line for line in warnings)
    assert f"resumed from step {facts['older']} ({folder}/run/checkpoints/" in text


def test_sigterm_saves_and_exits_with_42(history):
    _, facts = history
    code, text = facts["stopped"]
    assert code == PREEMPTED and "Traceback" not in text
    stopped_at = facts["stopped_at"]
    assert f"step {stopped_at}: stopped on request, saved; run the same command" in text
    assert f"stopped: step {stopped_at}" in text.splitlines()[-1]
    assert f"resumed from step {stopped_at} " in facts["ended"][1]


def test_what_went_through_all_this_is_bit_equal(history):
    folder, facts = history
    assert (facts["ended"][0], facts["whole"][0]) == (0, 0)
    assert_equal_runs(folder / "run", folder / "whole")
    result = facts["ended"][1].splitlines()[-1]
    assert result.startswith(f"done: step {facts['stopped_at'] + 7}, test accuracy ")
    assert result.split(" (")[0] == facts["whole"][1].splitlines()[-1].split(" (")[0]


def test_the_metrics_of_the_whole_run_are_there_once(history):
    """What a killed process logged beyond its last checkpoint has been dropped."""
    folder, facts = history
    lines = {}
    for name in ("run", "whole"):
        rows = [row for row in tiny.rows(folder / name) if "train/loss" in row]
        lines[name] = {row["step"]: row["train/loss"] for row in rows}
        assert [row["step"] for row in rows] == sorted(lines[name])
    extra = set(lines["run"]) - set(lines["whole"])
    assert extra <= {facts["stopped_at"]} and set(lines["whole"]) <= set(lines["run"])
    for step, loss in lines["whole"].items():
        assert lines["run"][step] == pytest.approx(loss, abs=1e-6)


def test_a_full_disk_ends_the_run_and_spares_the_checkpoints(history, tmp_path):
    """Not even this checkpoint fits: files may be no larger than half of it."""
    folder, facts = history
    run = tmp_path / "run"
    shutil.copytree(folder / "half", run)
    (run / "metrics.jsonl").unlink()
    before = steps_saved(run)
    size = (run / "checkpoints" / f"{before[-1]:09d}" / STATE).stat().st_size
    flags = flags_of(run, ENDLESS, *ONE)
    code, text = processes.run(*flags, log=tmp_path / "log", file_limit=size // 2)
    assert code == 1
    message = message_of(text)
    assert "could not save step" in message and "File too large" in message
    assert "Earlier checkpoints are untouched; make room" in message
    assert (
        steps_saved(run) == before == sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    )
    assert open_checkpoint(str(run)).step == facts["stopped_at"]


# two workers

TWO = ("--config.model.dropout=0.0", "--config.optimizer.name=sgd")


def start_workers(stack, folder, name, total_steps, count=2):
    flags = flags_of(folder / "run", total_steps, *TWO, "--config.strategy.name=multiworker")
    return stack.enter_context(processes.hosts(*flags, log=folder / name, count=count))


def ends(workers):
    return [(worker.wait(), worker.text()) for worker in workers]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """SIGTERM to one of two workers, SIGKILL to one, to the end; then all of it by one process."""
    folder, facts = tmp_path_factory.mktemp("cluster"), {}
    run = folder / "run"
    with ExitStack() as stack:
        workers = start_workers(stack, folder, "stopped", ENDLESS)
        workers[0].wait_for(lambda: steps_saved(run))
        os.kill(workers[1].pid, signal.SIGTERM)
        facts["stopped"] = ends(workers)
    facts["stopped_at"] = steps_saved(run)[-1]

    with ExitStack() as stack:
        workers = start_workers(stack, folder, "killed", ENDLESS)
        workers[0].wait_for(lambda: steps_saved(run)[-1] > facts["stopped_at"])
        os.kill(workers[1].pid, signal.SIGKILL)
        facts["killed"] = ends(workers)
    facts["killed_at"] = steps_saved(run)[-1]

    total = facts["killed_at"] + 5
    with ExitStack() as stack:
        facts["ended"] = ends(start_workers(stack, folder, "ended", total))
    flags = flags_of(folder / "single", total, *TWO)
    facts["single"] = processes.run(*flags, log=folder / "single-log")
    return folder, facts


def test_sigterm_to_one_worker_stops_all_at_the_same_step(cluster):
    _, facts = cluster
    assert [code for code, _ in facts["stopped"]] == [PREEMPTED, PREEMPTED]
    for _, text in facts["stopped"]:
        assert f"step {facts['stopped_at']}: stopped on request, saved" in text
        assert "Traceback" not in text


def test_a_worker_that_loses_another_says_so_and_leaves(cluster):
    _, facts = cluster
    (code, text), (killed, _) = facts["killed"]
    assert killed == -signal.SIGKILL and code == 1
    message = message_of(text)
    assert "lost another worker" in message and "Start all of them again" in message


def test_workers_resume(cluster):
    _, facts = cluster
    assert [code for code, _ in facts["ended"]] == [0, 0]
    for _, text in facts["ended"]:
        assert f"resumed from step {facts['killed_at']} " in text


def test_two_workers_train_as_one(cluster):
    folder, facts = cluster
    assert facts["single"][0] == 0
    assert_equal_runs(folder / "run", folder / "single", tolerance=1e-5)


def test_two_workers_evaluate_exactly(cluster):
    folder, _ = cluster
    last = {}
    for name in ("run", "single"):
        last[name] = tiny.rows(folder / name)[-1]
    assert last["run"]["test/examples"] == 360
    assert last["run"]["test/accuracy"] == pytest.approx(last["single"]["test/accuracy"], abs=1e-9)
    assert last["run"]["test/loss"] == pytest.approx(last["single"]["test/loss"], abs=1e-5)


def test_only_the_chief_writes(cluster):
    folder, facts = cluster
    assert len(list((folder / "run").glob("events.out.tfevents.*"))) == 3  # one for each start
    steps = [row["step"] for row in tiny.rows(folder / "run") if "train/loss" in row]
    assert steps == sorted(set(steps))
    chief, other = (text for _, text in facts["ended"])
    assert "done: step" in chief and "done: step" not in other


def test_a_worker_that_never_starts_is_named(tmp_path):
    with ExitStack() as stack:
        flags = ("--config.strategy.name=multiworker", "--config.strategy.timeout_seconds=0.5")
        environment = tf_config({"worker": ["localhost:1", "localhost:2"]}, index=1)
        worker = stack.enter_context(
            processes.Command(
                *flags_of(tmp_path / "run", 5, *flags),
                log=tmp_path / "log",
                env=environment,
            )
        )
        assert worker.wait() == 1
        message = message_of(worker.text())
    assert "worker 1 waited 0.5 s in vain for worker 0 (localhost:1)" in message
