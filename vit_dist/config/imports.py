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
    """The dotted names of modules in config.imports, as a tuple.

    Raises:
      ConfigError: `names` is no list or tuple of dotted names.
    """
    # A single name may come as a string. Only names are taken, never paths: what is imported runs.
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
    """Imports the modules in order; each registers its ops and sources when first imported.

    Raises:
      ConfigError: there is no such module. An error inside of a module keeps its own traceback.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # error.name is what is missing: `name` itself or a package around it, or else another
            # module that `name` imports, which is a fault of the user's code.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"config.imports names {name!r}, which is no module here: start in the folder that "
                "holds it, or add that folder to PYTHONPATH"
            ) from None
