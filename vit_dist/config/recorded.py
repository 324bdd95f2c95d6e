"""The config that a run recorded, as a config file: get_config(path) reads it.

A run leaves its resolved config in config.json in its folder, and in the manifest of each
checkpoint. `--config` takes the folder of a run, that of a checkpoint, or either file.
"""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vit_dist.config.defaults import get_defaults
from vit_dist.config.errors import ConfigError

CONFIG, MANIFEST = "config.json", "manifest.json"


def find(path: str) -> epath.Path | None:
    """The file with the recorded config that a path names or holds; None if there is none."""
    if path.endswith(".json"):
        return epath.Path(path)
    if ".py" in path:
        return None
    folder = epath.Path(path).expanduser()
    for name in (CONFIG, MANIFEST):
        if (folder / name).exists():
            return folder / name
    manifests = sorted((folder / "checkpoints").glob(f"*/{MANIFEST}"))
    return manifests[-1] if manifests else None


def get_config(path: str) -> ConfigDict:
    """The defaults with what the run recorded; keys that came later keep their default.

    Raises:
      ConfigError: no such file, or no config in it.
    """
    file = find(path)
    if file is None or not file.exists():
        raise ConfigError(f"{path}: there is no {CONFIG} of a run here")
    try:
        recorded = json.loads(file.read_text())
        recorded = recorded["notes"]["config"] if "notes" in recorded else recorded
        config = get_defaults()
        _take(config, recorded, "config")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} holds no config of a run ({error!r})") from None
    return config


def _take(config: ConfigDict, recorded: dict[str, Any], where: str) -> None:
    for key, value in recorded.items():
        if key not in config:
            raise ConfigError(
                f"{where}.{key} was recorded by another version and is unknown to this one"
            )
        if isinstance(config[key], ConfigDict):
            _take(config[key], value, f"{where}.{key}")
        else:
            with config.ignore_type():
                config[key] = value
