"""Checks of evaluators' options, made when a config is read, before a device starts."""

from collections.abc import Sequence
from typing import Any

from vit_dist.config.errors import ConfigError


def each_positive(name: str, values: Any, *, kind: type = float, zero: bool = False) -> None:
    """Raises ConfigError unless `values` is a list or tuple of positive numbers, at least one.

    Args:
      name: of the option, for the message.
      values: what was given.
      kind: int for whole numbers, float for any.
      zero: whether 0 is allowed, too.
    """
    kinds = (int,) if kind is int else (int, float)
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    for value in values if good else ():
        number = isinstance(value, kinds) and not isinstance(value, bool)
        # A comparison with NaN is false, and infinity is no number to compute with.
        good = good and number and (0 < value < float("inf") or (zero and value == 0))
    if not good:
        what = "whole numbers" if kind is int else "numbers"
        least = "0 or more" if zero else "above 0"
        raise ConfigError(f"{name} must be a list of {what} {least}, got {values!r}")


def at_least_one(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number above 0, got {value!r}")
