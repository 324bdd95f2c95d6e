"""Learning-rate schedules, by the formulas of big_vision, optax and timm.

Step t (counted from 0) updates with a learning rate of peak * factor. During the first
`warmup_steps` the factor is

    start_factor + (1 - start_factor) t / warmup

and after them, with p = min(1, (t - warmup) / (total - warmup)) and e = end_factor:

    cosine      e + (1 - e) (1 + cos(pi p)) / 2
    linear      e + (1 - e) (1 - p)
    polynomial  e + (1 - e) (1 - p) ** power
    rsqrt       1 / sqrt(1 + (t - warmup) / timescale)
    step        drop ** (number of milestones, in percent of the run, that t has reached)
    constant    1

During the last `cooldown_steps` the factor is also multiplied by (total - t) / cooldown. With
decay_from "start" p is t / total, as in timm. With hold_steps = h the rate changes only every h
steps, as timm changes it once an epoch. With a warmup and start_factor 0 the first update has
learning rate 0, as in big_vision.
"""

import dataclasses
import math

import tensorflow as tf

from vit_dist.config.errors import ConfigError

NAMES = ("cosine", "linear", "polynomial", "rsqrt", "step", "constant")
DECAY_FROM = ("warmup", "start")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Schedule(peak, total_steps=N, ...)(step) is the learning rate of the update of `step`.

    Attributes:
      learning_rate: the peak, which the factor multiplies.
      total_steps: steps of the run.
      name: one of NAMES; the module's docstring has their formulas.
      warmup_steps, cooldown_steps, timescale_steps, hold_steps: durations in steps.
      start_factor: the factor at the first step of a warmup.
      end_factor: the factor at the end, for the formulas that have an e.
      power: the exponent of "polynomial".
      milestones: for "step": percentages of the run, rising.
      drop: for "step": what each milestone multiplies the rate by.
      decay_from: where p begins: at the end of the "warmup", or at the "start" of the run.

    Raises:
      ConfigError: unknown name, a warmup or cooldown longer than the run, a number out of range.
    """

    learning_rate: float
    total_steps: int
    name: str = "cosine"
    warmup_steps: int = 0
    cooldown_steps: int = 0
    timescale_steps: int = 10_000
    hold_steps: int = 1
    start_factor: float = 0.0
    end_factor: float = 0.0
    power: float = 2.0
    milestones: tuple | list = (30.0, 60.0, 90.0)
    drop: float = 0.1
    decay_from: str = "warmup"

    def __post_init__(self) -> None:
        choices = (("", self.name, NAMES), (".decay_from", self.decay_from, DECAY_FROM))
        for key, value, allowed in choices:
            if value not in allowed:
                raise ConfigError(
                    f"schedule{key} {value!r} is unknown; allowed: {', '.join(allowed)}"
                )
        if self.total_steps < 0:
            raise ConfigError(f"total_steps must be 0 or more, got {self.total_steps}")
        # Runs of 0 or 1 step are let through: no ramp fits into them, and the rate is finite.
        ramps = self.warmup_steps + self.cooldown_steps
        if ramps > max(self.total_steps - 1, 0) and self.total_steps > 1:
            raise ConfigError(
                f"schedule: {self.warmup_steps} steps of warmup and {self.cooldown_steps} of "
                f"cooldown do not fit into a run of {self.total_steps}; shorten them or train "
                "longer"
            )
        for key in ("start_factor", "end_factor", "drop"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"schedule.{key} must be in [0, 1], got {getattr(self, key)}")
        if min(self.warmup_steps, self.cooldown_steps) < 0:
            raise ConfigError("schedule: warmup and cooldown must not be negative")
        if self.timescale_steps < 1:
            raise ConfigError(
                f"schedule.timescale must be 1 step or more, got {self.timescale_steps}"
            )
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(
                "schedule: learning_rate must not be negative, nor infinite, got "
                f"{self.learning_rate}"
            )
        if self.hold_steps < 1:
            raise ConfigError(f"schedule.hold must be 1 step or more, got {self.hold_steps}")
        if not 0 < self.power < math.inf:
            raise ConfigError(f"schedule.power must be above 0, got {self.power}")
        rising = isinstance(self.milestones, tuple | list) and all(
            isinstance(m, int | float) and 0 < m < 100 for m in self.milestones
        )
        rising = rising and sorted(set(self.milestones)) == list(self.milestones)
        if not rising or not self.milestones:
            raise ConfigError(
                "schedule.milestones must be percentages of the run that rise, such as "
                f"(30, 60, 90), got {self.milestones!r}"
            )

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The learning rates, float32, of steps (int, of any shape)."""
        step = tf.convert_to_tensor(step)
        # Only where it is needed: a TPU has no division of 64-bit integers, and XLA replaces one by
        # 2000 operations.
        if self.hold_steps > 1:
            step = step // self.hold_steps * self.hold_steps
        # float32 holds whole numbers exactly up to 2**24 = 16,777,216. A longer run rounds t by a
        # step or so, which a smooth schedule does not show.
        t = tf.cast(step, tf.float32)
        factor = self._decay(t)
        if self.warmup_steps:
            rising = self.start_factor + (1 - self.start_factor) * t / self.warmup_steps
            factor = tf.where(t < self.warmup_steps, rising, factor)
        if self.cooldown_steps:
            factor *= tf.clip_by_value((self.total_steps - t) / self.cooldown_steps, 0.0, 1.0)
        return self.learning_rate * factor

    def _decay(self, t: tf.Tensor) -> tf.Tensor:
        """The factor after the warmup, by the formula of `name`."""
        begin = self.warmup_steps if self.decay_from == "warmup" else 0
        # max(..., 1): no division by 0 where the whole run is warmup.
        p = tf.clip_by_value((t - begin) / max(self.total_steps - begin, 1), 0.0, 1.0)
        end = self.end_factor
        if self.name == "cosine":
            return end + (1 - end) * 0.5 * (1 + tf.cos(math.pi * p))
        if self.name in ("linear", "polynomial"):
            return end + (1 - end) * (1 - p) ** (1.0 if self.name == "linear" else self.power)
        if self.name == "rsqrt":
            return tf.math.rsqrt(1 + tf.maximum(t - begin, 0.0) / self.timescale_steps)
        if self.name == "step":
            # Milestones in steps, not rounded: a percentage need not fall on a whole step.
            milestones = [m * self.total_steps / 100 for m in self.milestones]
            reached = [tf.cast(t >= milestone, tf.float32) for milestone in milestones]
            return self.drop ** tf.add_n(reached)
        return tf.ones_like(t)
