"""Learning-rate schedules, by the formulas of big_vision (utils.create_learning_rate_schedule)."""

import math
from collections.abc import Callable

import tensorflow as tf

NAMES = ("cosine", "linear", "rsqrt", "constant")


def make_schedule(
    learning_rate: float,
    *,
    total_steps: int,
    name: str = "cosine",
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    timescale_steps: int = 10_000,
    end_factor: float = 0.0,
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Makes schedule(step) -> float32 learning rate of the update that `step` (from 0) does.

    With p = (step - warmup) / (total - warmup) clipped to [0, 1] and e = end_factor:
    cosine: e + (1 - e) (1 + cos(pi p)) / 2; linear: e + (1 - e) (1 - p);
    rsqrt: 1 / sqrt(1 + (step - warmup) / timescale), and 1 during warmup; constant: 1;
    all times learning_rate * min(1, step / warmup) * min(1, (total - step) / cooldown).
    So with a warmup the first update has learning rate 0, as in the reference.

    Raises:
      ValueError: unknown name, a warmup or cooldown longer than the run, end_factor out of [0, 1].
    """
    if name not in NAMES:
        raise ValueError(f"schedule {name!r} is unknown; allowed: {', '.join(NAMES)}")
    if total_steps < 0:
        raise ValueError(f"total_steps must be 0 or more, got {total_steps}")
    if warmup_steps + cooldown_steps > max(total_steps - 1, 0) and total_steps > 1:
        raise ValueError(
            f"schedule: {warmup_steps} steps of warmup and {cooldown_steps} of cooldown do not fit "
            f"into a run of {total_steps}; shorten them or train longer"
        )
    if not 0 <= end_factor <= 1:
        raise ValueError(f"schedule.end_factor must be in [0, 1], got {end_factor}")
    if timescale_steps <= 0 or warmup_steps < 0 or cooldown_steps < 0 or learning_rate < 0:
        raise ValueError("schedule: learning_rate and durations must not be negative")

    def schedule(step: tf.Tensor) -> tf.Tensor:
        t = tf.cast(step, tf.float32)
        span = max(total_steps - warmup_steps, 1)
        p = tf.clip_by_value((t - warmup_steps) / span, 0.0, 1.0)
        factor = tf.ones_like(t)
        if name == "cosine":
            factor = end_factor + (1 - end_factor) * 0.5 * (1 + tf.cos(math.pi * p))
        elif name == "linear":
            factor = end_factor + (1 - end_factor) * (1 - p)
        elif name == "rsqrt":
            factor = tf.math.rsqrt(1 + tf.maximum(t - warmup_steps, 0.0) / timescale_steps)
        if warmup_steps:
            factor *= tf.minimum(1.0, t / warmup_steps)
        if cooldown_steps:
            factor *= tf.clip_by_value((total_steps - t) / cooldown_steps, 0.0, 1.0)
        return learning_rate * factor

    return schedule
