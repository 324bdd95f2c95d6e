"""What stands beside weights: config.json, preprocessor_config.json, our own note in a file.

Each is asked for what no tensor tells, and checked, as anyone may have written it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from vit_dist.config.errors import DataError
from vit_dist.model.formats.architectures import check_architecture
from vit_dist.model.formats.tensors import AGAIN, TensorFile

METADATA = "vit_dist"  # key of a safetensors file's metadata: our own description of the network
# What messages call the makers of files.
_TITLES = {
    "npz": "vision_transformer or big_vision",
    "timm": "timm (or DeiT, DINO, MAE)",
    "huggingface": "Hugging Face",
}


# Keys of a config.json -> whose it is. One that lost the name of its network still has settings.
_KINDS = (
    (("architecture",), "timm"),
    (("model_type", "architectures"), "huggingface"),
    (("model_args", "pretrained_cfg"), "timm"),
    (("hidden_act", "hidden_size", "num_attention_heads", "layer_norm_eps"), "huggingface"),
)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The dictionary in a file; {} where there is no file.

    Raises:
      DataError: it is no JSON, or no dictionary.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}){AGAIN}") from None
    # Taken for an absent file, it would let the defaults of a network speak.
    if not isinstance(parsed, dict):
        raise DataError(f"{path} is damaged (a {type(parsed).__name__} is no dictionary){AGAIN}")
    return parsed


def config_beside(folder: Path, file: TensorFile, system: str) -> tuple[dict[str, Any], str]:
    """The config.json that tells of the file's network, {} for none; what messages call it.

    Raises:
      DataError: config.json is damaged, or of another network than the tensors.
    """
    config = read_json(folder, "config.json")
    kind = next((kind for keys, kind in _KINDS if any(key in config for key in keys)), None)
    if kind is None:  # something else of this name, such as the config of a run
        # Then what a training script noted in the file, where it is one of PyTorch's.
        return (dict(file.config) if system == "timm" else {}), "its training script"
    _check_types(config)
    # Also of an .npz, whose names of tensors say what it is: no name of another network stands
    # beside it by accident.
    if config.get("architecture"):
        check_architecture(str(config["architecture"]), "config.json")
    if system != "npz" and kind != system:
        raise DataError(
            f"config.json beside it is of {_TITLES[kind]}, while its tensors are named as "
            f"{_TITLES[system]} names them: put the file where its own config.json is"
        )
    return config, "config.json"


# Keys of a config.json, or of its model_args, whose values are used -> what they must be.
_TYPES: dict[str, Any] = {
    "architecture": str,
    "model_args": dict,
    "pretrained_cfg": dict,
    "architectures": list,
    "id2label": dict,
    **dict.fromkeys(("hidden_act", "act_layer", "pooler_act", "global_pool", "model_type"), str),
    **dict.fromkeys(("layer_norm_eps", "norm_epsilon"), (int, float)),
    **dict.fromkeys(("num_attention_heads", "num_heads"), int),
    **dict.fromkeys(("image_size", "img_size"), (int, list)),
    **dict.fromkeys(("mean", "std", "image_mean", "image_std"), (int, float, list)),
}


def _check_types(config: Mapping[str, Any]) -> None:
    """Raises DataError where config.json has a value of another kind than it is used as."""
    for key, value in config.items():
        kinds = _TYPES.get(key, object)
        right = value is None or isinstance(value, kinds)
        # Lists are checked entry by entry, as the table knows only their type.
        if key in ("image_size", "img_size") and isinstance(value, list):
            right = len(value) == 2 and all(isinstance(n, int) for n in value)
        if key in ("mean", "std", "image_mean", "image_std") and isinstance(value, list):
            right = all(isinstance(n, (int, float)) for n in value)
        if key in ("std", "image_std") and value is not None and right:
            right = all(n > 0 for n in _by_channel(value))
        if key == "id2label" and isinstance(value, dict):
            right = all(str(number).isdigit() for number in value)
        if not right:
            raise DataError(f"config.json has {key}={value!r}, which cannot be: correct it")
        # Dictionaries of keys that are checked likewise.
        if key in ("model_args", "pretrained_cfg"):
            _check_types(value or {})


def own_note(file: TensorFile) -> dict[str, Any]:
    """What a file that we wrote says of itself beyond shapes; {} for files of others."""
    try:
        # Not a mistake of the user's: any program may write metadata, so nothing is raised here.
        parsed = json.loads(file.metadata.get(METADATA, "{}"))
    except ValueError:
        return {}  # another program's text under our key
    keys = ("gelu", "norm_epsilon", "norm_after_pool", "num_heads", "pool", "image_size")
    # Only what no shape tells; the rest is taken from the tensors as in every file.
    found = {k: parsed[k] for k in keys if isinstance(parsed, dict) and k in parsed}
    if found and "prefix_posemb" in parsed:
        found["prefix_posemb"] = (parsed["prefix_posemb"],)
    return found


def scaling(system: str, config: Mapping[str, Any], folder: Path) -> tuple[Any, Any]:
    """Mean and std of images in 0..1; None where nothing tells."""
    if system == "npz":
        return (0.5,), (0.5,)
    if system == "timm":
        found = config.get("pretrained_cfg") or config
        return _by_channel(found.get("mean")), _by_channel(found.get("std"))
    found = read_json(folder, "preprocessor_config.json")
    _check_types(found)
    # Images in 0..1 as they are.
    if found.get("do_normalize") is False:
        return (0.0,), (1.0,)
    return _by_channel(found.get("image_mean")), _by_channel(found.get("image_std"))


def other_preparation(
    system: str, config: Mapping[str, Any], folder: Path, size: tuple[int, int] | None
) -> str:
    """What is asked for in preparing images that a plain resize to the model's size does not do.

    Args:
      system, config, folder: see scaling.
      size: (height, width) of the model; None where it is not known.

    Returns:
      Keys and values, such as "crop_pct 0.9, crop_mode 'center'"; "" for a plain resize, or where
      nothing tells.
    """
    plain: dict[str, tuple[Any, ...]] = {}
    told: Mapping[str, Any] = {}
    if system == "timm":
        told = config.get("pretrained_cfg") or config
        plain = {"crop_pct": (1,), "crop_mode": ("squash",), "interpolation": ("bilinear",)}
        # timm's own, where it is told one of them and not the others.
        usual = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
        if any(told.get(key) is not None for key in plain):
            told = {key: usual[key] if told.get(key) is None else told[key] for key in plain}
    elif system == "huggingface":
        told = read_json(folder, "preprocessor_config.json")
        sizes = () if size is None else ({"height": size[0], "width": size[1]}, max(size))
        # 2 is PIL's number of bilinear.
        plain = {"do_resize": (True,), "size": sizes, "do_center_crop": (False,), "resample": (2,)}
    other = {k: told[k] for k in plain if told.get(k) is not None and told[k] not in plain[k]}
    return ", ".join(f"{key} {value!r}" for key, value in other.items())


def _by_channel(value: Any) -> Any:
    """A number as a list of one; lists and None as they are."""
    return [value] if isinstance(value, (int, float)) else value


def class_names(config: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Names by the head's outputs; () where there are none, or only numbers in their place.

    Names of other classes than the head's, as a changed head leaves behind, are none: a warning
    tells their number.
    """
    names = config.get("label_names") or (config.get("pretrained_cfg") or {}).get("label_names")
    if not names and isinstance(config.get("id2label"), dict):
        table = config["id2label"]
        # JSON's keys are text: by number, or "10" would come before "2".
        names = [table[k] for k in sorted(table, key=int)]
    if not isinstance(names, list):
        return ()
    # transformers calls classes without names LABEL_0, LABEL_1, ...; without a head it has two.
    if names == [f"LABEL_{i}" for i in range(len(names))]:
        return ()
    if len(names) != num_classes:
        if num_classes:
            logging.warning(
                "config.json names %d classes and the head has %d outputs: the names are not used",
                len(names),
                num_classes,
            )
        return ()
    return tuple(map(str, names))
