"""Learning-rate schedules, by the formulas of big_vision, optax and timm.

The factor of learning_rate is, in the first `warmup_steps`,

    start_factor + (1 - start_factor) step / warmup

and then, with p = (step - warmup) / (total - warmup), at most 1, and e = end_factor:

    cosine      e + (1 - e) (1 + cos(pi p)) / 2
    linear      e + (1 - e) (1 - p)
    polynomial  e + (1 - e) (1 - p) ** power
    rsqrt       1 / sqrt(1 + (step - warmup) / timescale)
    step        drop ** (number of milestones, in percent of the run, that step has reached)
    constant    1

all times min(1, (total - step) / cooldown). With decay_from "start" p is step / total, as in
timm; a hold above 1 keeps the rate for so many steps, as timm does for an epoch. With a warmup
the first update has learning rate 0 unless there is a start_factor, as in the reference.
"""

import math
from collections.abc import Callable

import tensorflow as tf

NAMES = ("cosine", "linear", "polynomial", "rsqrt", "step", "constant")
DECAY_FROM = ("warmup", "start")


def make_schedule(
    learning_rate: float,
    *,
    total_steps: int,
    name: str = "cosine",
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    timescale_steps: int = 10_000,
    hold_steps: int = 1,
    start_factor: float = 0.0,
    end_factor: float = 0.0,
    power: float = 2.0,
    milestones: tuple | list = (30.0, 60.0, 90.0),
    drop: float = 0.1,
    decay_from: str = "warmup",
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Makes schedule(step) -> float32 learning rate of the update that `step` (from 0) does.

    Args: see the module. All durations are in steps, factors are of `learning_rate`, milestones
      in percent of `total_steps`.

    Raises:
      ValueError: unknown name, a warmup or cooldown longer than the run, a number out of range.
    """
    given = dict(locals())
    _check(**given)

    def decayed(t: tf.Tensor) -> tf.Tensor:
        begin = warmup_steps if decay_from == "warmup" else 0
        p = tf.clip_by_value((t - begin) / max(total_steps - begin, 1), 0.0, 1.0)
        if name == "cosine":
            return end_factor + (1 - end_factor) * 0.5 * (1 + tf.cos(math.pi * p))
        if name in ("linear", "polynomial"):
            return end_factor + (1 - end_factor) * (1 - p) ** (1.0 if name == "linear" else power)
        if name == "rsqrt":
            return tf.math.rsqrt(1 + tf.maximum(t - begin, 0.0) / timescale_steps)
        if name == "step":
            reached = [tf.cast(t >= m * total_steps / 100, tf.float32) for m in milestones]
            return drop ** tf.add_n(reached)
        return tf.ones_like(t)

    def schedule(step: tf.Tensor) -> tf.Tensor:
        step = tf.convert_to_tensor(step)
        if hold_steps > 1:  # a TPU has no 64-bit division: it takes 2000 operations
            step = step // hold_steps * hold_steps
        t = tf.cast(step, tf.float32)
        factor = decayed(t)
        if warmup_steps:
            rising = start_factor + (1 - start_factor) * t / warmup_steps
            factor = tf.where(t < warmup_steps, rising, factor)
        if cooldown_steps:
            factor *= tf.clip_by_value((total_steps - t) / cooldown_steps, 0.0, 1.0)
        return learning_rate * factor

    return schedule


def _check(
    *,
    learning_rate,
    total_steps,
    name,
    warmup_steps,
    cooldown_steps,
    timescale_steps,
    hold_steps,
    start_factor,
    end_factor,
    power,
    milestones,
    drop,
    decay_from,
) -> None:
    for key, value, allowed in (("", name, NAMES), (".decay_from", decay_from, DECAY_FROM)):
        if value not in allowed:
            raise ValueError(f"schedule{key} {value!r} is unknown; allowed: {', '.join(allowed)}")
    if total_steps < 0:
        raise ValueError(f"total_steps must be 0 or more, got {total_steps}")
    if warmup_steps + cooldown_steps > max(total_steps - 1, 0) and total_steps > 1:
        raise ValueError(
            f"schedule: {warmup_steps} steps of warmup and {cooldown_steps} of cooldown do not fit "
            f"into a run of {total_steps}; shorten them or train longer"
        )
    for key, value in (("start_factor", start_factor), ("end_factor", end_factor), ("drop", drop)):
        if not 0 <= value <= 1:
            raise ValueError(f"schedule.{key} must be in [0, 1], got {value}")
    if timescale_steps <= 0 or warmup_steps < 0 or cooldown_steps < 0 or learning_rate < 0:
        raise ValueError("schedule: learning_rate and durations must not be negative")
    if hold_steps < 1:
        raise ValueError(f"schedule.hold must be 1 step or more, got {hold_steps}")
    if power <= 0:
        raise ValueError(f"schedule.power must be above 0, got {power}")
    numbers = isinstance(milestones, tuple | list) and all(
        isinstance(m, int | float) and 0 < m < 100 for m in milestones
    )
    if not numbers or not milestones or sorted(set(milestones)) != list(milestones):
        raise ValueError(
            "schedule.milestones must be percentages of the run that rise, such as (30, 60, 90), "
            f"got {milestones!r}"
        )
