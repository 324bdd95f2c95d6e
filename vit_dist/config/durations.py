"""Durations of a run in steps; a config gives each in one unit, such as total_epochs."""

import math
from collections.abc import Mapping
from typing import Any

from vit_dist.config.errors import ConfigError

UNITS = ("steps", "epochs", "examples", "percent", "minutes")
# Times from one event to the next.
_PERIODS = ("log", "eval", "save", "figures")
# Positions of examples are int64, and reading runs ahead of the steps.
_MOST_EXAMPLES = 2**62


def duration(
    section: Mapping[str, Any],
    name: str,
    *,
    batch_size: int,
    num_examples: int,
    total_steps: int | None = None,
    where: str = "config",
) -> int:
    """The duration `name` of a section in optimizer steps, rounded to the nearest, at least 0.

    A duration in minutes gives 0: the clock decides then, not a number of steps. What comes again
    and again ("log", "save", ...) comes with every step where its share of a short run rounds to 0:
    only 0 itself is never.

    Args:
      section: a finalised config or section with keys such as log_steps and log_epochs.
      name: "total", "log", "warmup", ...
      batch_size: examples per step.
      num_examples: examples per epoch.
      total_steps: steps of the whole run, which `_percent` refers to.
      where: the section's name, for messages.

    Raises:
      ConfigError: no unit is set, the value is negative, or a percentage above 100; "total" is so
        large that its examples cannot be numbered.
    """
    # `finalize` has set all units to None but the one that counts.
    units = [u for u in UNITS if f"{name}_{u}" in section]
    for unit in units:
        value = section[f"{name}_{unit}"]
        if value is None:
            continue
        if not 0 <= value < math.inf or (unit == "percent" and value > 100):
            limit = "0 to 100" if unit == "percent" else "0 or more"
            raise ConfigError(f"{where}.{name}_{unit} must be {limit}, got {value}")
        # Optimizer steps that one of the unit takes. total_steps is None only for "total" itself,
        # which has no percentage.
        per_unit = {
            "steps": 1,  # an int, by which no digit is lost
            "epochs": num_examples / batch_size,
            "examples": 1 / batch_size,
            "percent": (total_steps or 0) / 100,
            "minutes": 0.0,
        }[unit]
        steps = round(value * per_unit)
        if name in _PERIODS and value and unit != "minutes":
            steps = max(steps, 1)
        # Whatever else takes so long is never done, which may be meant.
        if name == "total" and steps * batch_size > _MOST_EXAMPLES:
            most = _MOST_EXAMPLES // batch_size
            raise ConfigError(
                f"{where}.{name}_{unit}={value} is {steps} steps of {batch_size} examples; at most "
                f"{most} can be counted"
            )
        return steps
    raise ConfigError(
        f"{where}.{name} is not set; set one of " + ", ".join(f"{where}.{name}_{u}" for u in units)
    )


def without_durations(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without its durations, which are given to the section's reader in steps instead."""
    return {k: v for k, v in section.items() if k.rsplit("_", 1)[-1] not in UNITS}
