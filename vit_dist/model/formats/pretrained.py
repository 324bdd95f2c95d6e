"""A pretrained ViT from any file we know: its tensors under our names, and what it is."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_dist.model.formats import huggingface, timm
from vit_dist.model.formats import vision_transformer as npz
from vit_dist.model.formats.containers import merge, open_tensors
from vit_dist.model.formats.mapping import depth_of, from_theirs
from vit_dist.model.formats.tensors import AGAIN, LazyArray, TensorFile
from vit_dist.model.variants import CLS_POOLS, as_pair

_SYSTEMS: dict[str, Any] = {"npz": npz, "timm": timm, "huggingface": huggingface}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "weights.npz", "model.npz")
_INDEX = "model.safetensors.index.json"
METADATA = "vit_dist"  # key of a safetensors file's metadata: our own description of the network
# Parts of networks that are no plain ViT, and what they are.
_FOREIGN = {
    "norm_pre": "a LayerNorm before the blocks (CLIP)",
    "q_norm": "normalised queries (qk_norm)",
    "w12": "SwiGLU",
    "weights_in": "SwiGLU",
    "relative_position": "relative positions (BEiT)",
    "q_bias": "biases of queries and values alone (BEiT, EVA)",
    "conv_root": "a ResNet stem (hybrid)",
    "stem.": "a convolutional stem",
    "rope": "rotary positions",
}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint of whatever origin.

    Attributes:
      path: where it came from.
      system: "npz", "timm" or "huggingface".
      tensors: by our names (named_weights).
      network: as far as known, ViT.get_config()'s keys; what the file does not tell is absent.
      unused: their names of tensors that a ViT has no use for, known to be other parts.
      unknown: their names of tensors that nothing accounts for.
      mean, std: of images in 0..1, per channel or one number; None where the file does not tell.
      class_names: in the order of the head's outputs; empty where the file does not tell.
    """

    path: str
    system: str
    tensors: Mapping[str, LazyArray]
    network: dict[str, Any]
    unused: Sequence[str] = ()
    unknown: Sequence[str] = ()
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    class_names: Sequence[str] = ()


def open_pretrained(path: Path, *, image_size: int | tuple[int, int] | None = None) -> Pretrained:
    """Opens a file, or a folder with weights and config.json; reads no numbers yet.

    Args:
      path: local.
      image_size: in pixels, where the file's positions are of a grid that is not square and nothing
        beside it tells.

    Raises:
      ValueError: no such file, damaged, not safe to open, or no plain ViT; says what it is.
    """
    folder, file = _open(path)
    system = next((name for name, s in _SYSTEMS.items() if s.detect(file.tensors)), None)
    if system is None:
        raise ValueError(
            f"{path} is no ViT of vision_transformer, big_vision, timm or Hugging Face; it holds "
            f"e.g. {', '.join(sorted(file.tensors)[:3])}"
        )
    try:
        return _convert(path, system, file, _json(folder, "config.json"), folder, image_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _open(path: Path) -> tuple[Path, TensorFile]:
    if not path.is_dir():
        return path.parent, open_tensors(path)
    if (path / _INDEX).exists():
        shards = sorted(set(_json(path, _INDEX).get("weight_map", {}).values()))
        if not shards or any(Path(name).name != name for name in shards):
            raise ValueError(f"{path / _INDEX} is damaged: it names no files beside it{AGAIN}")
        return path, merge({name: open_tensors(path / name) for name in shards})
    for name in _WEIGHTS:
        if (path / name).exists():
            return path, open_tensors(path / name)
    files = [p for p in path.iterdir() if p.suffix in (".npz", ".safetensors", ".pth", ".bin")]
    if len(files) != 1:
        raise ValueError(
            f"{path} holds {len(files)} files of weights, none of them {_WEIGHTS[0]}: name one"
        )
    return path, open_tensors(files[0])


def _json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}){AGAIN}") from None
    return parsed if isinstance(parsed, dict) else {}


def _convert(
    path: Path, system: str, file: TensorFile, config: dict[str, Any], folder: Path, image_size: Any
) -> Pretrained:
    module = _SYSTEMS[system]
    canonical = module.canonical(file.tensors)
    if system == "npz":
        said = module.describe(canonical)
    else:
        said = module.describe(file.tensors if system == "timm" else canonical, config)
    converted = from_theirs(canonical, module.RULES)
    said |= _own(file)
    network = _network(converted.tensors, said, image_size)
    unused = [name for name in converted.rest if module.OTHER_PARTS.match(name)]
    unknown = [name for name in converted.rest if name not in unused]
    mean, std = _scaling(system, config, folder)
    return Pretrained(
        path=str(path),
        system=system,
        tensors=converted.tensors,
        network=network,
        unused=unused,
        unknown=unknown,
        mean=mean,
        std=std,
        class_names=_class_names(config, network["num_classes"]),
    )


def _own(file: TensorFile) -> dict[str, Any]:
    """What a file that we wrote says of itself beyond shapes."""
    try:
        parsed = json.loads(file.metadata.get(METADATA, "{}"))
    except ValueError:
        return {}  # another program's text under our key
    keys = ("gelu", "norm_epsilon", "norm_after_pool", "num_heads", "pool", "image_size")
    found = {k: parsed[k] for k in keys if isinstance(parsed, dict) and k in parsed}
    if found and "prefix_posemb" in parsed:
        found["prefix_posemb"] = (parsed["prefix_posemb"],)
    return found


def explain_unknown(names: Sequence[str]) -> str:
    """Why a file with these tensors is no plain ViT, as far as it can be told."""
    for part, meaning in _FOREIGN.items():
        if any(part in name for name in names):
            return f"{meaning} is not supported"
    return "another kind of network"


def _network(
    tensors: Mapping[str, LazyArray], said: dict[str, Any], image_size: Any
) -> dict[str, Any]:
    """The arguments of ViT that shapes and file tell."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    kernel, dense = shapes["embedding/kernel"], "encoderblock_0/mlp/dense_0/kernel"
    if len(kernel) != 4 or kernel[0] != kernel[1] or dense not in shapes:
        raise ValueError(f"no ViT: its patch kernel is {kernel}, its blocks {depth_of(shapes)}")
    network: dict[str, Any] = {
        "patch_size": kernel[0],
        "channels": kernel[2],
        "width": kernel[3],
        "depth": depth_of(shapes),
        "mlp_dim": shapes[dense][1],
        "num_classes": shapes.get("head/kernel", (0, 0))[1],
        "rep_size": shapes.get("pre_logits/kernel", (0, 0))[1],
        # Its value matters to fresh weights only.
        "layer_scale": 1e-5 if "encoderblock_0/layer_scale_0/gamma" in shapes else None,
        "qkv_bias": "encoderblock_0/attention/query/bias" in shapes,
        "cls_token": "cls" in shapes,
        "registers": shapes.get("registers", (0, 0))[1],
        "posemb": "learned" if "pos_embedding" in shapes else "sincos2d",
    }
    network |= {k: v for k, v in said.items() if v is not None and k not in _PLACED}
    if network["pool"] in CLS_POOLS and not network["cls_token"]:
        raise ValueError(f"it pools {network['pool']!r} without a cls token")
    return network | _positions(shapes, network, said, image_size)


_PLACED = ("prefix_posemb", "image_size")


def _positions(
    shapes: Mapping[str, tuple[int, ...]], network: dict[str, Any], said: dict[str, Any], asked: Any
) -> dict[str, Any]:
    """image_size and prefix_posemb, from the length of the position table."""
    size = asked or said.get("image_size")
    patch = network["patch_size"]
    if "pos_embedding" not in shapes:
        return {"image_size": as_pair(size)} if size else {}
    length = shapes["pos_embedding"][1]
    entries = {"cls": int(network["cls_token"]), "none": 0}
    entries["all"] = entries["cls"] + network["registers"]
    preferred = said.get("prefix_posemb") or ("cls", "none")
    patches = {kind: length - entries[kind] for kind in preferred}
    if size:
        height, width = as_pair(size)
        fits = {k for k, n in patches.items() if n == (height // patch) * (width // patch)}
    else:
        fits = {k for k, n in patches.items() if n > 0 and math.isqrt(n) ** 2 == n}
    if not fits:
        known = f"images of {size}" if size else "a square grid"
        raise ValueError(
            f"its {length} positions are not those of {known}: set config.init_image_size to "
            "(height, width) in pixels, as it was trained"
        )
    kind = next(k for k in preferred if k in fits)
    if not size:
        side = math.isqrt(patches[kind]) * patch
        size = (side, side)
    if kind == "all" and not network["registers"]:
        kind = "cls"
    return {"image_size": as_pair(size), "prefix_posemb": kind}


def _scaling(system: str, config: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    if system == "npz":
        return (0.5,), (0.5,)
    if system == "timm":
        found = config.get("pretrained_cfg", config)
        return found.get("mean"), found.get("std")
    found = _json(folder, "preprocessor_config.json")
    if found.get("do_normalize") is False:
        return (0.0,), (1.0,)
    return found.get("image_mean"), found.get("image_std")


def _class_names(config: dict[str, Any], num_classes: int) -> tuple[str, ...]:
    names = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    if not names and isinstance(config.get("id2label"), dict):
        table = config["id2label"]
        names = [table[k] for k in sorted(table, key=int)]
    return tuple(map(str, names)) if names and len(names) == num_classes else ()
