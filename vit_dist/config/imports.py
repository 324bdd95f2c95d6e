"""A user's own modules, which register ops and sources where a config names them.

A run records their names in its config, so that predict, export, evaluate and show of the run
import them again. They are modules on Python's own path, never files beside weights.
"""

import hashlib
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
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


def sources_digest(names: Sequence[str]) -> str:
    """A digest of the source files of modules: of the whole package of one that is in a package.

    What a module imports beside its package is not looked at.
    """
    digest = hashlib.sha256()
    for name in names:
        top = importlib.import_module(name.partition(".")[0])
        # A package's folders; a module that is a file has none. Built-in modules have no file.
        folders = [Path(folder) for folder in getattr(top, "__path__", ())]
        files = [(p, str(p.relative_to(f))) for f in folders for p in sorted(f.rglob("*.py"))]
        if not folders and getattr(top, "__file__", None):
            files = [(Path(str(top.__file__)), Path(str(top.__file__)).name)]
        # The folder's own path may be another on each host.
        for path, shown in files:
            digest.update(f"{name} {shown}\n".encode() + path.read_bytes())
    return digest.hexdigest()
