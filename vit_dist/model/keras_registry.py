"""Makes keras.models.load_model read our .keras files once vit_dist is imported.

Keras looks a class up among those that were registered when their modules were imported. Importing
our model takes TensorFlow, which `import vit_dist` shall not. So a stand-in is registered as soon
as Keras itself is imported; the model's module is imported when a file asks for it.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE, _CLASS = "vit_dist.model.vit", "ViT"


class _StandIn:
    """Is what Keras finds for our class before the module of the class is imported."""

    @staticmethod
    def from_config(config: dict[str, Any]) -> Any:
        return getattr(importlib.import_module(_MODULE), _CLASS).from_config(config)

    def get_config(self) -> dict[str, Any]:
        """Only here because Keras registers no class without it."""
        return {}


def _register(keras: ModuleType) -> None:
    # Importing the model's module registers the class itself, in the stand-in's place.
    if _MODULE not in sys.modules:
        # Under the name "vit_dist>ViT", which .keras files hold.
        keras.saving.register_keras_serializable("vit_dist", _CLASS)(_StandIn)


class _KerasFinder(MetaPathFinder):
    """Finds no module itself, but registers the stand-in when `keras` has been imported."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "keras":
            return None
        # Out of the list, so that the search below asks the other finders; and needed only once.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            # Classes can be registered only once Keras has been executed, for which Python has no
            # hook: so the function that executes the module is replaced by one that registers
            # afterwards.
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_keras_is_there() -> None:
    """Registers the stand-in now if Keras is imported, else when it will be."""
    if "keras" in sys.modules:
        _register(sys.modules["keras"])
    else:
        # First, as the finder that finds `keras` ends the search.
        sys.meta_path.insert(0, _KerasFinder())
