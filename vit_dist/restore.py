"""Where a run begins: resume > resume_from > init_from > scratch."""

import json

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from vit_dist import config as config_lib
from vit_dist.model.weights import adapt_weights
from vit_dist.strategy import num_hosts
from vit_dist.training.checkpoint import Checkpoint, open_checkpoint
from vit_dist.training.state import TrainState
from vit_dist.wiring import Run


def check_resume(
    found: Checkpoint | None, config: ConfigDict, strategy: tf.distribute.Strategy
) -> None:
    """All hosts must see the same checkpoint, and the data order must still be the same."""
    if num_hosts(strategy) > 1:
        mine = tf.constant([0 if found is None else found.step], tf.int64)
        gathered = strategy.run(lambda: tf.distribute.get_replica_context().all_gather(mine, 0))
        steps = np.unique(strategy.experimental_local_results(gathered)[0].numpy())
        if len(steps) > 1:
            raise ValueError(
                f"the hosts see different checkpoints (steps {steps.tolist()}): the workdir must "
                "be on storage that all of them share"
            )
    if found is None:
        return
    changed = config_lib.changes(found.notes["config"], json.loads(config_lib.to_json(config)))
    order = [c for c in changed if c.startswith(("seed:", "input.batch_size:", "data."))]
    if order:
        raise ValueError(
            f"the workdir holds step {found.step} of a run with another order of the data "
            f"({'; '.join(order)}): use the same, or start in another workdir with "
            "config.resume_from or config.init_from"
        )
    for change in changed:
        logging.warning("resuming with a changed config: %s", change)


def restore_or_init(state: TrainState, run: Run, found: Checkpoint | None) -> str:
    """Resume > resume_from > init_from > scratch; returns a line that says which it was."""
    config = run.config
    if found is not None:
        state.from_arrays(found.arrays)
        return f"resumed from step {found.step} ({found.path})"
    if config.resume_from:
        checkpoint = open_checkpoint(config.resume_from)
        state.from_arrays(checkpoint.arrays)
        return f"continuing {checkpoint.path} from step {checkpoint.step}"
    if config.init_from:
        report = init_from(state, config.init_from, method=config.posemb_method)
        return f"weights from {config.init_from}\n{report}"
    return "starting from scratch"


def init_from(state: TrainState, path: str, *, method: str) -> str:
    """Takes the weights (the moving average where there is one) of another run.

    Returns:
      The load report.

    Raises:
      ValueError: no checkpoint there, or one of another network.
    """
    checkpoint = open_checkpoint(path)
    averaged = any(name.startswith("ema/") for name in checkpoint.arrays)
    prefix = "ema/" if averaged else "model/"
    arrays = {
        name.removeprefix(prefix): array
        for name, array in checkpoint.arrays.items()
        if name.startswith(prefix)
    }
    source = checkpoint.notes["model"]
    report = adapt_weights(state.model, arrays, source=source, method=method)
    if state.ema is not None:
        for average, weight in zip(state.ema.weights, state.model.weights, strict=True):
            average.assign(weight)
    return str(report)
