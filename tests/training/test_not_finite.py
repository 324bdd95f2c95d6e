"""A NaN in one step of a run, from end to end: found at the next log or save, none of it kept."""

import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests.support.stepping import assert_bits
from tests.support.tiny import arrays, rows, without_evaluation
from vit_dist.train import train
from vit_dist.training.step import make_train_step

BAD, SAVED, TOTAL = 5, 4, 8  # the step that goes wrong, the checkpoint before it, the run's length
MIRRORED = {"strategy__name": "mirrored", "strategy__virtual_cpus": 2}
WHERE = {
    "one device": {},
    "two devices": MIRRORED,
    "two devices that hold a part each": {**MIRRORED, "optimizer__shard_state": True},
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


@pytest.fixture(scope="module", params=WHERE)
def clean(request, tmp_path_factory):
    """The options, and the folder of a run in which nothing goes wrong."""
    options = {
        **WHERE[request.param], "total_steps": TOTAL, "save_steps": 2, "step__ema_decay": 0.9,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("clean")
    train(without_evaluation(**options), str(folder))
    return options, folder


@pytest.mark.parametrize("log_steps", [100, 1])
def test_the_run_ends_and_can_go_on(clean, tmp_path, monkeypatch, log_steps):
    """At the save at step 6, or the log there: it names step 5, and the checkpoint of 4 stays."""
    options, folder = clean
    if log_steps == 1 and "strategy__name" in options:
        return  # when it is noticed does not depend on the devices
    noticed = 6
    config = without_evaluation(**options, log_steps=log_steps)
    with monkeypatch.context() as patch:
        patch.setattr("vit_dist.run.build.make_train_step", poisoned)
        with pytest.raises(FloatingPointError, match=f"gradient of step {BAD} is not finite"):
            train(config, str(tmp_path / "run"))
    logged = [row["step"] for row in rows(tmp_path / "run")]
    assert max(logged) < noticed and (max(logged) == BAD) == (log_steps == 1)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["000000002", f"{SAVED:09d}"]
    state = arrays(tmp_path / "run")
    assert (state["step"], state["first_bad_step"], state["updates"]) == (SAVED, -1, SAVED)
    assert all(np.isfinite(value).all() for value in state.values())
    # The cause gone, the same command goes on, as if it had never been.
    shutil.copytree(tmp_path / "run", tmp_path / "mended")
    train(config, str(tmp_path / "mended"))
    assert_bits(arrays(tmp_path / "mended"), arrays(folder))
