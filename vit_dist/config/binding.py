"""Binding a config section to the signature of the function that it feeds (law 3)."""

import difflib
import inspect
import re
import types
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args, get_origin

from vit_dist.config.errors import ConfigError


def bind(
    function: Callable[..., Any], section: Mapping[str, Any], *, name: str, **given: Any
) -> dict[str, Any]:
    """The keyword arguments of `function` from a section of the config and other, computed values.

    Args:
      function: reads the section; its signature tells names and types of the keys.
      section: a section of the config.
      name: the section's name, for messages.
      **given: arguments that do not come from the section.

    Raises:
      ConfigError: a key that the function does not take or that is in `given`, an argument that is
        missing, or a value of a wrong type.
    """
    # The signature is the list of keys, so a key that nothing reads cannot be set without effect.
    # The lock of a ConfigDict does not ensure that: a config file may replace a whole section.
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
    # A mistake of whoever wrote the function: `from __future__ import annotations` makes strings.
    if isinstance(annotation, str):
        raise TypeError(f"{key}: string annotations cannot be checked")
    # float | None -> (float, NoneType)
    union = isinstance(annotation, types.UnionType)
    allowed = get_args(annotation) if union else (annotation,)
    # A generic such as tuple[int, int]: the function checks such a value itself.
    if any(get_origin(t) or not isinstance(t, type) for t in allowed):
        return
    # A bool is an int to Python, but a mistake where a number belongs.
    if isinstance(value, bool):
        fits = bool in allowed
    else:
        fits = isinstance(value, allowed) or (isinstance(value, int) and float in allowed)
    if not fits:
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
        raise ConfigError(f"{key} must be {wanted}, got {value!r}")


def check_range(key: str, value: float, interval: str, *, none: bool = False) -> None:
    """Raises ConfigError if a number is not in an interval such as "[0, 1)"; NaN is in no interval.

    Args:
      key: the key's name, for the message.
      value: the number.
      interval: with inf or -inf for an end that has no limit.
      none: whether the message offers None as well.
    """
    left, low, high, right = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", interval).groups()  # type: ignore[union-attr]
    above = value >= float(low) if left == "[" else value > float(low)
    below = value <= float(high) if right == "]" else value < float(high)
    # NaN fails both comparisons, infinity the one with an open end at inf.
    if above and below:
        return
    # In words where an end is infinite: "0 or more" rather than "in [0, inf)".
    wanted = f"in {interval}"
    if low == "-inf" and high == "inf":
        wanted = "a finite number"
    elif high == "inf":
        wanted = f"{low} or more" if left == "[" else f"above {low}"
    elif isinstance(value, int) and left + right == "[]":
        wanted = f"in {low}..{high}"
    raise ConfigError(f"{key} must be {wanted}{', or None' if none else ''}, got {value!r}")


def look_alike(names: Iterable[str], others: Iterable[str]) -> str:
    """Why a name is missing that seems to be there; "" if none of `others` looks like one of them.

    Copies by way of macOS or Windows change how "é" is stored (one sign, or an e and an accent),
    capitals, or spaces.
    """

    def plain(name: str) -> str:
        return "".join(unicodedata.normalize("NFKC", name).casefold().split())

    known = {plain(other): other for other in others}
    for name in names:
        other = known.get(plain(name), name)
        if other != name:
            return (
                f"; {name!a} and {other!a} look alike and are two names (stored signs, "
                "capitals or spaces differ): rename one of them"
            )
    return ""


def did_you_mean(name: str, allowed: Any) -> str:
    """ "; did you mean 'x'?" with the nearest of `allowed`, or nothing."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
