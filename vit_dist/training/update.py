"""The second half of a step: what every replica does with the summed gradients (law 2).

Unscale, is it finite?, clip by the global norm, move the variables, average, count.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from vit_dist.training.state import TrainState

GROWTH_STEPS = 2000  # float16: good steps after which the loss scale doubles (as Keras and Apex)

Tensors = dict[str, tf.Tensor]


def make_update(
    state: TrainState,
    *,
    schedule: Callable[[tf.Tensor], tf.Tensor],
    clip_norm: float | None,
    ema_decay: float | None,
) -> Callable[..., Any]:
    """Makes update(summed gradients, summed metrics) -> metrics; moves this replica's variables.

    With sharded optimiser state it wants the replica's number too, and returns (metrics, packed
    weights, gate): the slots have moved, the weights wait for make_settle's.
    """
    scaled = state.model.compute_dtype == "float16"

    def update(grads: list[tf.Tensor], sums: Tensors, replica: int | None = None):
        step, scale = state.step.value(), state.loss_scale.value()
        if scaled:
            grads = [g / scale for g in grads]
        norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(g) for g in grads]))
        finite = tf.math.is_finite(norm) & tf.math.is_finite(sums["loss"])
        gate = finite & (state.first_bad_step.value() < 0)
        if clip_norm is not None:
            factor = tf.minimum(1.0, clip_norm / tf.maximum(norm, 1e-30))
            grads = [g * factor for g in grads]
        rate = schedule(step)
        packed = state.optimizer.apply(
            grads, learning_rate=rate, count=state.updates.value(), gate=gate, replica=replica
        )
        if packed is None:
            _average(state, ema_decay, gate)
        # float16 overflows now and then and recovers; the rest, and a scale of 1, never do.
        bad = ~finite & ((scale <= 1.0) if scaled else True) & (state.first_bad_step.value() < 0)
        state.first_bad_step.assign(tf.where(bad, step, state.first_bad_step.value()))
        if scaled:
            _rescale(state, finite)
        state.updates.assign_add(tf.cast(gate, tf.int64))
        state.step.assign_add(1)
        metrics = {**sums, "grad_norm": norm, "learning_rate": rate}
        return metrics if packed is None else (metrics, packed, gate)

    return update


def make_settle(
    state: TrainState, *, ema_decay: float | None
) -> Callable[[tf.Tensor, tf.Tensor], None]:
    """Makes settle(what all replicas packed, gate): the end of an update of sharded state."""

    def settle(gathered: tf.Tensor, gate: tf.Tensor) -> None:
        state.optimizer.take(gathered)
        _average(state, ema_decay, gate)

    return settle


def _average(state: TrainState, decay: float | None, gate: tf.Tensor) -> None:
    """Moves the average of the weights, where there is one, to those that the model has now."""
    if state.ema is None or decay is None:
        return
    for average, weight in zip(state.ema.weights, state.model.weights, strict=True):
        old = tf.convert_to_tensor(average.value)
        new = old + (1 - decay) * (tf.convert_to_tensor(weight.value) - old)
        average.value.assign(tf.where(gate, new, old))


def _rescale(state: TrainState, finite: tf.Tensor) -> None:
    """Dynamic loss scaling (arXiv 1710.03740): halve on overflow, double after GROWTH_STEPS."""
    good = tf.where(finite, state.good_steps.value() + 1, tf.zeros((), tf.int64))
    grow = good >= GROWTH_STEPS
    factor = tf.where(finite, tf.where(grow, 2.0, 1.0), 0.5)
    state.loss_scale.assign(tf.maximum(state.loss_scale.value() * factor, 1.0))
    state.good_steps.assign(tf.where(grow, tf.zeros((), tf.int64), good))
