"""What is saved when: before anything else can fail, by the clock, never while it goes wrong."""

import os
import signal

import pytest

from tests.support import tiny
from vit_dist import train as train_module
from vit_dist.cluster.preemption import Preemption
from vit_dist.train import train
from vit_dist.training import state as state_lib


def config(**changed):
    """8 steps; a checkpoint and an evaluation of three batches at step 4."""
    changed = {"total_steps": 8, "save_steps": 4, "eval_steps": 4, "log_steps": 4, **changed}
    return tiny.make(input__eval_batch_size=60, **changed)


def steps_saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def evaluated(workdir):
    """Step -> what was found on val."""
    found = [row for row in tiny.rows(workdir) if "val/loss" in row]
    return {row["step"]: (row["val/loss"], row["val/accuracy"]) for row in found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A minute that is over at once: each call of the step ends with a checkpoint."""
    workdir = tmp_path_factory.mktemp("whole")
    limits = {"save_minutes": 1e-9, "save_steps": None, "log_steps": 8}
    train(config(keep_checkpoints=9, **limits), str(workdir))
    return workdir


def test_an_evaluation_is_given_up_for_a_signal_and_done_again(tmp_path, undisturbed, monkeypatch):
    class Disturbed(train_module.Evaluation):
        """Sends a signal after the first batch of the first evaluation."""

        calls = 0

        def __call__(self, split, *, stop):
            def disturbing():
                Disturbed.calls += 1
                if Disturbed.calls == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return stop()

            return super().__call__(split, stop=disturbing)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "Evaluation", Disturbed)
        metrics = train(config(), str(tmp_path / "run"))
    assert Disturbed.calls == 2  # it did not go on to the last batch
    assert metrics["preempted"] and metrics["step"] == 4
    assert steps_saved(tmp_path / "run") == [4]
    assert evaluated(tmp_path / "run") == {}
    train(config(), str(tmp_path / "run"))
    assert evaluated(tmp_path / "run") == evaluated(undisturbed)
    assert set(evaluated(undisturbed)) == {4, 8}
    tiny.assert_same(tiny.arrays(tmp_path / "run"), tiny.arrays(undisturbed))


def test_what_is_trained_is_saved_before_it_is_evaluated(tmp_path, monkeypatch):
    def fail(self, split, *, stop):
        raise RuntimeError("the evaluation fails")

    monkeypatch.setattr(train_module.Evaluation, "__call__", fail)
    with pytest.raises(RuntimeError, match="the evaluation fails"):
        train(config(), str(tmp_path))
    assert steps_saved(tmp_path) == [4]


def test_by_the_clock(undisturbed):
    # Calls may have 1, 2, 4 and 8 steps; the third ends at the evaluation of step 4.
    assert steps_saved(undisturbed) == [1, 3, 4, 8]


def test_nothing_is_saved_while_float16_skips_its_updates(tmp_path, monkeypatch):
    """Loss scales of 2**26 and less make gradients larger than float16 holds (65504)."""
    monkeypatch.setattr(state_lib, "INITIAL_LOSS_SCALE", 2.0**29)
    train(config(precision="float16", save_steps=1, log_steps=1, keep_checkpoints=9), str(tmp_path))
    rows = [row for row in tiny.rows(tmp_path) if "train/loss_scale" in row]
    skipped = [0.0, *(row["train/skipped_steps"] for row in rows)]
    bad = [row["step"] for row, a, b in zip(rows, skipped, skipped[1:], strict=False) if b > a]
    assert 0 < len(bad) < 8  # the scale is halved until it fits
    assert steps_saved(tmp_path) == [step for step in range(1, 9) if step not in bad or step == 8]


def test_a_run_that_is_stopped_while_float16_skips_its_updates_is_saved(tmp_path, monkeypatch):
    """Who is told that it was saved must not lose the steps since the last checkpoint."""
    monkeypatch.setattr(state_lib, "INITIAL_LOSS_SCALE", 2.0**29)
    saw = []
    monkeypatch.setattr(Preemption, "noticed", property(lambda _: saw.append(1) or len(saw) == 2))
    metrics = train(config(precision="float16", log_steps=1), str(tmp_path))
    assert metrics["preempted"] and steps_saved(tmp_path) == [2]
    state = tiny.arrays(tmp_path)
    assert (state["step"], state["updates"]) == (2, 1)  # the second was skipped
