"""Binding a config section to the signature of the function that it feeds (law 3)."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin


def bind(
    function: Callable[..., Any], section: Mapping[str, Any], *, name: str, **given: Any
) -> dict[str, Any]:
    """The keyword arguments of `function` from a section of the config and values computed by us.

    Replacing a whole section passes a locked ConfigDict silently; the signature is what counts.

    Raises:
      ValueError: a key the function does not take, one that it needs, or one given twice.
    """
    parameters = inspect.signature(function).parameters
    for key in section:
        if key not in parameters or key in given:
            allowed = sorted(set(parameters) - set(given))
            raise ValueError(
                f"config.{name}.{key} is unknown{did_you_mean(key, allowed)} "
                f"Keys of config.{name}: {', '.join(allowed)}"
            )
    arguments = {**section, **given}
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in arguments]
    if missing:
        raise ValueError(f"config.{name} lacks {', '.join(missing)}")
    for key, value in section.items():
        check_type(f"config.{name}.{key}", value, parameters[key].annotation)
    return arguments


def check_type(key: str, value: Any, annotation: Any) -> None:
    """Raises ValueError if `value` is of none of the annotation's types; an int is a float too."""
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
        raise ValueError(f"{key} must be {wanted}, got {value!r}")


def did_you_mean(name: str, allowed: Any) -> str:
    """ "; did you mean 'x'?" with the nearest of `allowed`, or nothing."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
