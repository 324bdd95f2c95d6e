"""Binding a config section to the signature of the function that it feeds (law 3)."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin

from vit_dist.config.errors import ConfigError


def bind(
    function: Callable[..., Any], section: Mapping[str, Any], *, name: str, **given: Any
) -> dict[str, Any]:
    """The keyword arguments of `function` from a section of the config and values computed by us.

    Replacing a whole section passes a locked ConfigDict silently; the signature is what counts.

    Raises:
      ConfigError: a key the function does not take, one that it needs, or one given twice.
    """
    # The signature is the list of keys: a key that no function takes cannot be set without effect.
    parameters = inspect.signature(function).parameters
    for key in section:
        if key not in parameters or key in given:
            allowed = sorted(set(parameters) - set(given))
            raise ConfigError(
                f"config.{name}.{key} is unknown{did_you_mean(key, allowed)} "
                f"Keys of config.{name}: {', '.join(allowed)}"
            )
    arguments = {**section, **given}
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in arguments]
    if missing:
        raise ConfigError(f"config.{name} lacks {', '.join(missing)}")
    for key, value in section.items():
        check_type(f"config.{name}.{key}", value, parameters[key].annotation)
    return arguments


def check_type(key: str, value: Any, annotation: Any) -> None:
    """Raises ConfigError if `value` is of none of the annotation's types; an int is a float too."""
    if isinstance(annotation, str):
        raise TypeError(f"{key}: string annotations cannot be checked")  # a programmer's mistake
    allowed = get_args(annotation) or (annotation,)
    if any(get_origin(t) or not isinstance(t, type) for t in allowed):
        return  # a generic such as tuple[int, int]: the function's own checks judge it
    if isinstance(value, bool):  # an int to Python, but a mistake where a number belongs
        fits = bool in allowed
    else:
        fits = isinstance(value, allowed) or (isinstance(value, int) and float in allowed)
    if not fits:
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
        raise ConfigError(f"{key} must be {wanted}, got {value!r}")


def check_range(key: str, value: float, interval: str, *, none: bool = False) -> None:
    """Raises ConfigError if a number is not in an interval such as "[0, 1)"; NaN is in none.

    Args:
      key: for the message.
      value: the number.
      interval: with inf or -inf for an end that has no limit.
      none: whether the message offers None as well.
    """
    left, low, high, right = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", interval).groups()  # type: ignore[union-attr]
    above = value >= float(low) if left == "[" else value > float(low)
    below = value <= float(high) if right == "]" else value < float(high)
    if above and below:
        return
    wanted = f"in {interval}"
    if low == "-inf" and high == "inf":
        wanted = "a finite number"
    elif high == "inf":
        wanted = f"{low} or more" if left == "[" else f"above {low}"
    elif isinstance(value, int) and left + right == "[]":
        wanted = f"in {low}..{high}"
    raise ConfigError(f"{key} must be {wanted}{', or None' if none else ''}, got {value!r}")


def did_you_mean(name: str, allowed: Any) -> str:
    """ "; did you mean 'x'?" with the nearest of `allowed`, or nothing."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
