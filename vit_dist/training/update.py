"""The second half of a step: what every replica does with the summed gradients (law 2).

Unscale; test for infinities and NaN; clip by the global norm; update the variables; update the
moving average; count. Nothing here branches on the host: `apply_update` is a value on the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from vit_dist.training.state import TrainState
from vit_dist.training.watch import Watch

GROWTH_STEPS = 2000  # float16: good steps after which the loss scale doubles (as Keras and Apex)

Tensors = dict[str, tf.Tensor]


class Updated(NamedTuple):
    """What one update gives.

    Attributes:
      metrics: float32 scalars: the summed metrics, "grad_norm" before clipping, "learning_rate",
        in float16 "applied", 1.0 if the weights changed, 0.0 if an overflow skipped the step, and
        what a Watch finds.
      apply_update: scalar bool, whether this step changes weights and slots.
      packed: None, or with sharded optimizer state the new weights of the variables that this
        replica owns, (n,) float32. The model changes when `settle` gets the packs of all replicas.
    """

    metrics: Tensors
    apply_update: tf.Tensor
    packed: tf.Tensor | None


def make_update(
    state: TrainState,
    *,
    schedule: Callable[[tf.Tensor], tf.Tensor],
    clip_norm: float | None,
    ema_decay: float | None,
    ema_warmup: bool = False,
    watch: Watch | None = None,
) -> Callable[..., Updated]:
    """Makes update(grads, sums, replica=None), which changes this replica's variables.

    Its arguments are the gradients (float32, one per trained variable) and the metrics, both summed
    over the replicas, and with sharded optimizer state the number of the replica, an int.
    """
    watch = watch or Watch(state)
    scaled = state.model.compute_dtype == "float16"

    def update(grads: list[tf.Tensor], sums: Tensors, replica: int | None = None) -> Updated:
        step, scale = state.step.value(), state.loss_scale.value()
        # First, so that grad_norm and clip_norm are about the gradient of the loss itself.
        if scaled:
            grads = [g / scale for g in grads]
        # l2_loss is half the sum of squares. One infinity or NaN anywhere makes the norm infinite
        # or NaN. All replicas have the same sums, so all decide alike without another message.
        norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(g) for g in grads]))
        seen = watch.gradients(grads, done=lambda: step + 1)
        finite = tf.math.is_finite(norm) & tf.math.is_finite(sums["loss"])
        apply_update = finite & (state.first_bad_step.value() < 0)
        if clip_norm is not None:
            # 1e-30: without it a gradient of zeros would become 0 * (c / 0) = NaN.
            factor = tf.minimum(1.0, clip_norm / tf.maximum(norm, 1e-30))
            grads = [g * factor for g in grads]
        rate, before = schedule(step), watch.weights()
        packed = state.optimizer.apply(
            grads,
            learning_rate=rate,
            count=state.updates.value(),
            gate=apply_update,
            replica=replica,
        )
        # With sharded state the model still has its old weights here; `settle` averages then.
        if packed is None:
            share = _share_of_new(ema_decay, ema_warmup, state.updates.value())
            _update_average(state, share, apply_update)
            seen |= watch.updates(before, done=lambda: step + 1)
        # In float16 an overflow only lowers the loss scale. In other precisions, or where the scale
        # is 1 already, nothing can repair it. The number of the first bad step closes the gate for
        # good, and the host reads it at its next log or save (law 4).
        beyond_repair = ~finite & ((scale <= 1.0) if scaled else True)
        first = beyond_repair & (state.first_bad_step.value() < 0)
        state.first_bad_step.assign(tf.where(first, step, state.first_bad_step.value()))
        if scaled:
            _rescale(state, finite)
        # `step` is the position in the data and in the schedule, and moves always. Adam's bias
        # corrections depend on `updates`, the number of gradients that its moments have seen.
        state.updates.assign_add(tf.cast(apply_update, tf.int64))
        state.step.assign_add(1)
        metrics = {**sums, "grad_norm": norm, "learning_rate": rate, **seen}
        if scaled:
            metrics["applied"] = tf.cast(apply_update, tf.float32)
        return Updated(metrics, apply_update, packed)

    return update


def make_settle(
    state: TrainState,
    *,
    ema_decay: float | None,
    ema_warmup: bool = False,
    watch: Watch | None = None,
) -> Callable[[tf.Tensor, tf.Tensor], Tensors]:
    """Makes settle(gathered, apply_update), the end of an update of sharded optimizer state.

    It writes the new weights of all replicas, `gathered` (R n,) float32 in the replicas' order,
    into the model, and then updates the moving average. It returns what a Watch finds of it.
    """
    watch = watch or Watch(state)

    def settle(gathered: tf.Tensor, apply_update: tf.Tensor) -> Tensors:
        before = watch.weights()
        state.optimizer.take(gathered)
        # update() has counted this step, and this update, already.
        share = _share_of_new(ema_decay, ema_warmup, state.updates.value() - 1)
        _update_average(state, share, apply_update)
        return watch.updates(before, done=state.step.value)

    return settle


def _share_of_new(
    decay: float | None, warmup: bool, updates: tf.Tensor
) -> tf.Tensor | float | None:
    """What share of the moving average the new weights become: 1 - decay.

    With warm-up the decay is min(decay, 1 - (1 + t)^(-2/3)) after t `updates` (timm's ModelEmaV3):
    the average begins as the weights after the first update, and covers more of them as they come.
    """
    if decay is None or not warmup:
        return None if decay is None else 1 - decay
    return tf.maximum(1 - decay, (1.0 + tf.cast(updates, tf.float32)) ** (-2 / 3))


def _update_average(
    state: TrainState, share: tf.Tensor | float | None, apply_update: tf.Tensor
) -> None:
    """Moves the moving average, if there is one, towards the weights that the model has now."""
    if state.ema is None or share is None:
        return
    for average, weight in zip(state.ema.weights, state.model.weights, strict=True):
        old = tf.convert_to_tensor(average.value)
        new = old + share * (tf.convert_to_tensor(weight.value) - old)
        # A select rather than a branch: XLA fuses it into the arithmetic above.
        average.value.assign(tf.where(apply_update, new, old))


def _rescale(state: TrainState, finite: tf.Tensor) -> None:
    """Dynamic loss scaling (arXiv 1710.03740): halve on overflow, double after GROWTH_STEPS."""
    good = tf.where(finite, state.good_steps.value() + 1, tf.zeros((), tf.int64))
    grow = good >= GROWTH_STEPS
    factor = tf.where(finite, tf.where(grow, 2.0, 1.0), 0.5)
    # Not below 1: there scaling does nothing for float16, and an overflow counts as a bad step.
    state.loss_scale.assign(tf.maximum(state.loss_scale.value() * factor, 1.0))
    state.good_steps.assign(tf.where(grow, tf.zeros((), tf.int64), good))
