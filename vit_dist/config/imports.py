"""A user's own modules, which register ops and sources where a config names them.

A run records their names in its config, so that predict, export, evaluate and show of the run
import them again. They are modules on Python's own path, never files beside weights.
"""

import importlib
import re
from collections.abc import Sequence
from typing import Any

from vit_dist.config.errors import ConfigError


def check_imports(names: Any) -> tuple[str, ...]:
    """The dotted names of config.imports.

    Raises:
      ConfigError: anything but a list or tuple of them.
    """
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(
        isinstance(name, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name) for name in names
    ):
        raise ConfigError(
            "config.imports must be a list of modules as `import` takes them, such as "
            f"('my_ops',), got {names!r}"
        )
    return tuple(names)


def import_modules(names: Sequence[str]) -> None:
    """Imports them, in this order; each registers what it has at its first import.

    Raises:
      ConfigError: one is not there. What goes wrong inside of it keeps its own traceback.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, and imports another that is not
            raise ConfigError(
                f"config.imports names {name!r}, which is no module here: start in the folder that "
                "holds it, or add that folder to PYTHONPATH"
            ) from None
