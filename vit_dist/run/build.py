"""From a checked config to the parts of a run, made under its strategy."""

import contextlib

import tensorflow as tf

from vit_dist.cluster.hosts import device_kind
from vit_dist.model.variants import choose_form
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.run.check import Run
from vit_dist.training.optimizer import make_optimizer
from vit_dist.training.state import TrainState


def make_state(run: Run, strategy: tf.distribute.Strategy) -> TrainState:
    """Model, optimiser and moving average, new, under the strategy's scope."""
    build = {**run.build, "form": choose_form(device_kind(strategy))}
    with strategy.scope():
        model = build_vit(**build)
        ema = build_vit(**build) if run.step["ema_decay"] else None
    # Sharded, a slot is on one device alone, which the scope does not have.
    scope = contextlib.nullcontext() if run.optimizer["shard_state"] else strategy.scope()
    heads = run.build["config"]["num_heads"]
    with scope:
        optimizer = make_optimizer(
            named_weights(model), **run.optimizer, strategy=strategy, num_heads=heads
        )
    with strategy.scope():
        return TrainState(model, optimizer, ema)
