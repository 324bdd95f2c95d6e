"""A config file that reads the config which a run recorded: get_config(path).

A run writes its resolved config into config.json in its folder, and into the manifest of each
checkpoint. `--config` takes a run's folder, a checkpoint's folder, or one of these files, which
run/cli.py turns into this file's name, a colon and the path.
"""

import json
import re
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vit_dist.config.defaults import get_defaults
from vit_dist.config.errors import ConfigError

CONFIG, MANIFEST = "config.json", "manifest.json"
# Keys of the config.json that lies beside weights of timm's or Hugging Face's; no config of a run
# has one of them.
_FOREIGN = ("architecture", "architectures", "model_type", "model_args", "pretrained_cfg")


def of_best(path: str) -> str:
    """RUN:best as RUN/best, the folder of the run's best checkpoint; other paths as they are."""
    return f"{path.removesuffix(':best')}/best" if path.endswith(":best") else path


def find(path: str) -> epath.Path | None:
    """The file with the recorded config that a path names or holds; None if there is none."""
    path = of_best(path)
    if path.endswith(".json"):
        return epath.Path(path).expanduser()
    # configs/demo.py or configs/demo.py:argument, an ordinary config file.
    if re.search(r"\.py(:|$)", path):
        return None
    folder = epath.Path(path).expanduser()
    for name in (CONFIG, MANIFEST):
        if (folder / name).exists():
            return folder / name
    # A run's folder without config.json: the newest checkpoint's manifest, in a folder named by
    # its step with at least nine digits.
    manifests = (folder / "checkpoints").glob(f"*/{MANIFEST}")
    return max(manifests, key=lambda path: (len(path.parent.name), str(path)), default=None)


def get_config(path: str) -> ConfigDict:
    """The defaults, overwritten by what the run recorded.

    Keys that are newer than the run keep their default.

    Raises:
      ConfigError: no such file, or no config in it, such as that of another system's weights.
    """
    file = find(path)
    if file is None or not file.exists():
        raise ConfigError(f"{path}: there is no {CONFIG} of a run here")
    try:
        # config.json is the config itself, a manifest has it among its notes.
        recorded = json.loads(file.read_text())
        recorded = recorded["notes"]["config"] if "notes" in recorded else recorded
        foreign = [key for key in _FOREIGN if key in recorded]
        if foreign:
            raise ConfigError(
                f"{file.parent} holds weights of another system, which tell no config "
                f"({CONFIG} has {foreign[0]!r}): give --config=FILE, such as configs/transfer.py"
            )
        config = get_defaults()
        _take(config, recorded, "config")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        # Not repr(): the error of a text that is none holds all its bytes.
        text = f"{file} holds no config of a run ({type(error).__name__}: {error})"
        if file.name == CONFIG:
            text += "; without it, the config in the run's newest checkpoint is taken: remove it"
        raise ConfigError(text) from None
    return config


def _take(config: ConfigDict, recorded: dict[str, Any], where: str) -> None:
    """Copies recorded values into `config`, section by section; `where` is the section's name."""
    for key, value in recorded.items():
        if key not in config:
            raise ConfigError(
                f"{where}.{key} was recorded by another version and is unknown to this one"
            )
        if isinstance(config[key], ConfigDict):
            _take(config[key], value, f"{where}.{key}")
        else:
            # JSON has no tuples, and a value such as None changes the type of a key. finalize()
            # checks types afterwards.
            with config.ignore_type():
                config[key] = value
