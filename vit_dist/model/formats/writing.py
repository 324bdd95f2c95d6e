"""Writes a ViT of ours as another system's file or folder."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy

from vit_dist.config.errors import DataError
from vit_dist.model.formats import huggingface, timm
from vit_dist.model.formats import vision_transformer as npz
from vit_dist.model.formats.config_json import METADATA
from vit_dist.model.formats.mapping import to_theirs

FORMATS = ("npz", "big_vision", "timm", "huggingface")


def prefix_posemb_for(system: str, network: Mapping[str, Any]) -> str:
    """The prefix_posemb that a network must have to be written in a format.

    Formats differ in which tokens before the patches have an entry in the table of positions. Where
    weights are adapted to such a table, an entry that has no place is added to its token, and a new
    entry is zeros.

    Args:
      system: one of FORMATS.
      network: ViT.get_config() of what shall be written.
    """
    kind = network["prefix_posemb"]
    # Without such tokens there is nothing to choose.
    if not network["cls_token"] and not network["registers"]:
        return kind
    if system == "big_vision":
        return "none"
    if system == "npz":
        return "cls"
    # Registers without positions, beside a cls token with one, do not exist in timm.
    if system == "timm":
        return "all" if kind == "cls" and network["registers"] else kind
    # Hugging Face: the cls token always has a position; registers have one only in its DeiT, which
    # has no LayerScale.
    return "cls" if kind == "none" or network["layer_scale"] is not None else kind


def write_pretrained(
    path: Path,
    system: str,
    arrays: Mapping[str, np.ndarray],
    network: Mapping[str, Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] = (),
) -> list[Path]:
    """Writes the weights, and beside them what the other system needs to build the network.

    Args:
      path: the .npz or .safetensors file; for "timm" and "huggingface" a folder otherwise.
      system: one of FORMATS.
      arrays: every variable of the ViT, by our names.
      network: ViT.get_config(), positions as prefix_posemb_for says.
      mean, std: of images in 0..1.
      class_names: in the order of the head's outputs.

    Returns:
      The files written.

    Raises:
      DataError: the other system has no such network; says why.
    """
    style = {"npz": "npz", "big_vision": "big_vision"}.get(system)
    heads = network["num_heads"]
    # Formats that are one file tell nothing of the network: it must be what their readers take.
    if style:
        _refuse(system, npz.refuse(network, style))
        # These files say nothing of images: both systems scale them to [-1, 1].
        if not (np.allclose(mean, 0.5) and np.allclose(std, 0.5)):
            raise DataError(f"format {system}: images are scaled to [-1, 1] there; use timm")
        written = npz.layout(to_theirs(arrays, npz.RULES, num_heads=heads), style)
        return [_write_npz(path, written)]
    if system == "timm":
        _refuse(system, timm.refuse(network))
        written = to_theirs(arrays, timm.RULES, num_heads=heads)
        # The same LayerNorm has another name in timm where it stands behind the pooling.
        if network["norm_after_pool"]:
            written = {_fc_norm(name): array for name, array in written.items()}
        configs = {"config.json": timm.to_config(network, mean=mean, std=std, labels=class_names)}
    else:
        config = huggingface.to_config(network, labels=class_names)
        family = config["model_type"]
        written = to_theirs(arrays, huggingface.rules_for(family), num_heads=heads)
        written = huggingface.with_backbone(written, family, headless=not network["num_classes"])
        processor = huggingface.to_preprocessor(network, mean=mean, std=std)
        configs = {"config.json": config, "preprocessor_config.json": processor}
    return _write_safetensors(path, written, network, configs)


def _refuse(system: str, reasons: list[str]) -> None:
    if reasons:
        raise DataError(f"format {system} cannot hold this network: {'; '.join(reasons)}")


def _fc_norm(name: str) -> str:
    return f"fc_{name}" if name in ("norm.weight", "norm.bias") else name


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    if path.suffix != ".npz":
        raise DataError(f"give a file that ends in .npz, not {path}")
    # Any, as mypy takes one of the arrays for savez's allow_pickle.
    whole: Any = dict(arrays)
    with _whole(path) as file:
        np.savez(file, **whole)
    return path


def _write_safetensors(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    network: Mapping[str, Any],
    configs: Mapping[str, Any],
) -> list[Path]:
    metadata = {"format": "pt", METADATA: json.dumps(dict(network), default=str)}
    # A file named .safetensors is written alone: with our note in it, and no config.json beside.
    alone = path.suffix == ".safetensors"
    file = path if alone else path / "model.safetensors"
    # Not save_file: it makes files that only their owner may read.
    contents = {file: safetensors.numpy.save(dict(arrays), metadata)}
    for name, content in configs.items() if not alone else ():
        contents[path / name] = f"{json.dumps(content, indent=2)}\n".encode()
    for each, data in contents.items():
        with _whole(each) as out:
            out.write(data)
    return [*contents]


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name, and replaces an older one, once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
        part.replace(path)
    finally:
        # Nothing is left of a file that could not be written to its end.
        part.unlink(missing_ok=True)
