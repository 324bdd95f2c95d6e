"""A NaN in one step of a run, from end to end: found at the next log or save, none of it kept."""

import numpy as np
import pytest
import tensorflow as tf

from tests.support.stepping import assert_bits
from tests.support.tiny import arrays, make, rows, without_evaluation
from vit_dist.train import train
from vit_dist.training.step import make_train_step

BAD, SAVED, TOTAL = 5, 4, 8  # the step that goes wrong, the checkpoint before it, the run's length
MIRRORED = {"strategy__name": "mirrored", "strategy__virtual_cpus": 2}
PARTS = "two devices that hold a part each"
WHERE = {
    "one device": {},
    "two devices": MIRRORED,
    PARTS: {**MIRRORED, "optimizer__shard_state": True},
}


def poisoned(state, loss_fn, *, preprocess, strategy, **options):
    """make_train_step, with the images of step BAD not a number on the last replica alone."""
    last = strategy.num_replicas_in_sync - 1

    def spoil(images):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        hit = (state.step.value() == BAD) & (tf.cast(replica, tf.int32) == last)
        images = preprocess(images)
        return tf.where(hit, tf.constant(np.nan, images.dtype), images)

    return make_train_step(state, loss_fn, preprocess=spoil, strategy=strategy, **options)


# Who computes it: the devices of which each holds a part need the most agreement.
ALONE = [pytest.param(name, marks=pytest.mark.exhaustive) for name in WHERE if name != PARTS]


@pytest.fixture(scope="module", params=[PARTS, *ALONE])
def options(request):
    return {**WHERE[request.param], "total_steps": TOTAL, "save_steps": 2, "step__ema_decay": 0.9}


def run_poisoned(config, folder, monkeypatch, *, saved=(2, SAVED)):
    """Trains until it is noticed, by the save at step 6 or the log there, that step 5 is bad."""
    noticed = 6
    with monkeypatch.context() as patch:
        patch.setattr("vit_dist.run.build.make_train_step", poisoned)
        with pytest.raises(FloatingPointError, match=f"gradient of step {BAD} is not finite"):
            train(config, str(folder))
    logged = [row["step"] for row in rows(folder) if "train/loss" in row]
    assert max(logged) < noticed and (max(logged) == BAD) == (config.log_steps == 1)
    folders = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert folders == [f"{step:09d}" for step in saved]
    state = arrays(folder)
    assert (state["step"], state["first_bad_step"], state["updates"]) == (SAVED, -1, SAVED)
    assert all(np.isfinite(value).all() for value in state.values())


def test_a_save_notices_and_the_run_can_go_on(options, tmp_path, monkeypatch):
    config = without_evaluation(**options, log_steps=100)
    run_poisoned(config, tmp_path / "run", monkeypatch)
    # The cause gone, the same command goes on, as if it had never been.
    train(config, str(tmp_path / "run"))
    train(without_evaluation(**options), str(tmp_path / "clean"))
    assert_bits(arrays(tmp_path / "run"), arrays(tmp_path / "clean"))


def test_an_evaluation_notices_before_it_keeps_the_best(tmp_path, monkeypatch):
    """Its weights are those of before the bad step; a run that began with its state would end."""
    config = make(
        total_steps=TOTAL, save_steps=4, log_steps=100, eval_steps=6, keep_best="max val/accuracy"
    )
    run_poisoned(config, tmp_path / "run", monkeypatch, saved=[SAVED])
    assert not (tmp_path / "run" / "best").exists()


def test_a_log_notices(tmp_path, monkeypatch):
    """When that is does not depend on the devices."""
    config = without_evaluation(total_steps=TOTAL, save_steps=2, log_steps=1)
    run_poisoned(config, tmp_path / "run", monkeypatch)
