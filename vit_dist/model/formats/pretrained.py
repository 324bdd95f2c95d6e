"""A pretrained ViT from any file we know: its tensors under our names, and what it is."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_dist.config.errors import DataError
from vit_dist.model.formats import huggingface, timm
from vit_dist.model.formats import vision_transformer as npz
from vit_dist.model.formats.config_json import (
    class_names,
    config_beside,
    other_preparation,
    own_note,
    read_json,
    scaling,
)
from vit_dist.model.formats.containers import merge, open_tensors
from vit_dist.model.formats.foreign import explain_names, explain_shapes
from vit_dist.model.formats.mapping import depth_of, from_theirs
from vit_dist.model.formats.tensors import AGAIN, LazyArray, TensorFile
from vit_dist.model.unfit import UnfitError
from vit_dist.model.variants import CLS_POOLS, as_pair

_SYSTEMS: dict[str, Any] = {"npz": npz, "timm": timm, "huggingface": huggingface}
SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".pth.tar")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "weights.npz", "model.npz")
# Of a checkpoint in several files ("shards"): which tensor is in which of them.
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint of another system.

    Attributes:
      path: where it came from.
      system: whose names its tensors have: "npz", "timm" or "huggingface".
      tensors: by the names of our variables (named_weights).
      network: keys of ViT.get_config(), as far as known; what the file does not tell is absent.
      unused: names in the file of tensors known to be no part of an encoder or of its one head.
      unknown: names in the file of tensors that nothing accounts for.
      notes: lines for the load report: which parts were left out, which of several was taken.
      assumed: lines for the load report: what neither file nor config.json tells.
      mean, std: of images in 0..1, per channel or one number; None where the file does not tell.
      preparation: see config_json.other_preparation.
      class_names: in the order of the head's outputs; empty where the file does not tell.
    """

    path: str
    system: str
    tensors: Mapping[str, LazyArray]
    network: dict[str, Any]
    unused: Sequence[str] = ()
    unknown: Sequence[str] = ()
    notes: Sequence[str] = ()
    assumed: Sequence[str] = ()
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    preparation: str = ""
    class_names: Sequence[str] = ()


def open_pretrained(path: Path, *, image_size: int | tuple[int, int] | None = None) -> Pretrained:
    """Opens a file, or a folder with weights and config.json; reads no numbers yet.

    Args:
      path: local.
      image_size: in pixels, of the images that it was trained on; needed where the file's positions
        are of a grid that is not square and nothing beside it tells.

    Raises:
      DataError: no such file, damaged, not safe to open, or no plain ViT; says what it is.
      UnfitError: the size of its images must be told.
    """
    folder, file = _open(path)
    # Systems are told apart by the name of the patch embedding's kernel.
    system = next((name for name, s in _SYSTEMS.items() if s.detect(file.tensors)), None)
    if system is None:
        meaning = explain_names(file.tensors)
        raise DataError(
            f"{path} is no ViT of vision_transformer, big_vision, timm or Hugging Face; it holds "
            f"e.g. {', '.join(sorted(file.tensors)[:3])}" + (f": {meaning}" if meaning else "")
        )
    try:
        return _convert(path, system, file, folder, image_size)
    except UnfitError as error:
        raise UnfitError(f"{path}: {error}", error.settings) from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _open(path: Path) -> tuple[Path, TensorFile]:
    if not path.is_dir():
        return path.parent, open_tensors(path)
    # safetensors before all others: a folder often holds the same weights in several formats.
    if (path / _WEIGHTS[0]).exists():
        return path, open_tensors(path / _WEIGHTS[0])
    for index in _INDICES:
        if (path / index).exists():
            return path, _open_shards(path, index)
    for name in _WEIGHTS[1:]:
        if (path / name).exists():
            return path, open_tensors(path / name)
    files = [p for p in path.iterdir() if p.name.endswith(SUFFIXES)]
    # One file of any name will do; of several nobody knows which is meant.
    if len(files) != 1:
        raise DataError(
            f"{path} holds {len(files)} files of weights, none of them {_WEIGHTS[0]}: name one"
        )
    return path, open_tensors(files[0])


def _open_shards(path: Path, index: str) -> TensorFile:
    """All files that an index names, as one.

    Raises:
      DataError: the index is damaged, or a file does not hold a tensor that it should.
    """
    places = read_json(path, index).get("weight_map", {})
    # Whatever stands in the place of a name is no name of a file: the text of a list is none.
    shards = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    # A name with a folder in it could lead out of this folder.
    if not shards or any(Path(name).name != name for name in shards):
        raise DataError(f"{path / index} is damaged: it names no files beside it{AGAIN}")
    # Opening all reads their headers alone.
    whole = merge({name: open_tensors(path / name) for name in shards})
    missing = sorted(set(places) - set(whole.tensors))
    if missing:
        raise DataError(
            f"{path / places[missing[0]]} lacks {missing[0]}, which {index} says it holds{AGAIN}"
        )
    return whole


def _convert(
    path: Path, system: str, file: TensorFile, folder: Path, image_size: Any
) -> Pretrained:
    module = _SYSTEMS[system]
    # What the files say: config.json, the names of tensors, our own note where we wrote the file.
    config, where = config_beside(folder, file, system)
    canonical = module.canonical(file.tensors)
    shown: dict[str, Any] = {}
    assumed: list[str] = []
    own = own_note(file)
    if system == "npz":
        if "model_type" in config:
            huggingface.check_config(config, where)
        said, assumed = module.describe(canonical, file.tensors)
    else:
        said, shown, assumed = module.describe(
            file.tensors, config, wrapper=file.wrapper, where=where, noted=bool(own)
        )
    said = _agreed(said, own, where)
    # What the tensors say: those that are left out on purpose, those that rules take, and the rest.
    left_out = [n for n in canonical if module.is_other_part(n, canonical)]
    converted = from_theirs({n: t for n, t in canonical.items() if n not in left_out}, module.RULES)
    network = _network(converted.tensors, said, image_size, converted.rest)
    _check_shown(shown, network, where)
    unused, notes = _other_parts([*converted.rest, *left_out], module.OTHER_PARTS)
    mean, std = scaling(system, config, folder)
    return Pretrained(
        path=str(path),
        system=system,
        tensors=converted.tensors,
        network=network,
        unused=unused,
        unknown=[name for name in converted.rest if name not in unused],
        notes=[*file.notes, *notes, *_size_note(said, network, image_size)],
        assumed=[] if own else [*assumed, *_grid_note(system, said, network, image_size)],
        mean=mean,
        std=std,
        preparation=other_preparation(system, config, folder, network.get("image_size")),
        class_names=class_names(config, network["num_classes"]),
    )


def _agreed(said: dict[str, Any], own: dict[str, Any], where: str) -> dict[str, Any]:
    """What config.json and our own note in the file say, together.

    Raises:
      DataError: they contradict each other: one of them belongs to another file.
    """
    # Only a config.json can belong to another file: what a training script noted lies in the file.
    for key in ("gelu", "num_heads", "pool", "norm_after_pool"):
        theirs, ours = said.get(key), own.get(key)
        if None not in (theirs, ours) and theirs != ours and where == "config.json":
            raise DataError(
                f"config.json says {key} {theirs!r}, the file itself {ours!r}: put the file where "
                "its own config.json is"
            )
    return said | own


def _check_shown(shown: Mapping[str, Any], network: Mapping[str, Any], where: str) -> None:
    """Raises DataError if the config says something else than shapes show."""
    for key, value in shown.items():
        have = network.get(key, value)
        # Some configs give a square as two equal numbers.
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]  # a patch_size of [16, 16]
        if have != value:
            raise DataError(
                f"{where} says {key} {value!r}, while its tensors have {have!r}: put the file "
                "where its own config.json is"
            )


def _other_parts(
    names: Sequence[str], table: Sequence[tuple[str, str]]
) -> tuple[list[str], list[str]]:
    """The names that are known to be other parts, and a line for the report on each kind."""
    unused, notes = [], []
    for pattern, meaning in table:
        found = [name for name in names if re.match(pattern, name)]
        # A name may match several patterns.
        unused += [name for name in found if name not in unused]
        notes += [f"left out: {meaning}"] if found else []
    return unused, notes


def _network(
    tensors: Mapping[str, LazyArray], said: dict[str, Any], image_size: Any, names: Sequence[str]
) -> dict[str, Any]:
    """The arguments of ViT that shapes and file tell.

    Args:
      tensors: by our names.
      said: keys of ViT that the file tells beyond shapes.
      image_size: what the user says of it, or None.
      names: in the file, of tensors that have no place in our ViT.

    Raises:
      DataError: no ViT of ours has such tensors; says what it is instead.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    meaning = explain_shapes(shapes, depth=depth_of(shapes), fixed=said.get("posemb") == "sincos2d")
    if meaning:
        raise DataError(f"no plain ViT: it has {explain_names(names) or meaning}")
    # From here on there is no doubt that it is a plain ViT; its sizes are those of its tensors.
    # (0, 0) stands for the shape of a layer that is not there.
    kernel, dense = shapes["embedding/kernel"], "encoderblock_0/mlp/dense_0/kernel"
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
        # (1, registers, D) where there are some.
        "registers": shapes.get("registers", (0, 0))[1],
        "posemb": "learned" if "pos_embedding" in shapes else "sincos2d",
    }
    network |= {k: v for k, v in said.items() if v is not None and k not in _PLACED}
    if network["pool"] in CLS_POOLS and not network["cls_token"]:
        raise DataError(f"it pools {network['pool']!r} without a cls token")
    return network | _positions(shapes, network, said, image_size)


# Keys that a file may say and that depend on the length of its position table: see _positions.
_PLACED = ("prefix_posemb", "image_size")


def _positions(
    shapes: Mapping[str, tuple[int, ...]], network: dict[str, Any], said: dict[str, Any], asked: Any
) -> dict[str, Any]:
    """image_size and prefix_posemb, from the length of the position table.

    The table (1, n, D) has an entry for each of rows * columns patches, and for some or all of the
    tokens before the patches. For how many of these follows from the size of the images where that
    is known; else it is assumed that the patches form a square.

    Raises:
      UnfitError: no such division fits.
    """
    size = asked or said.get("image_size")
    patch = network["patch_size"]
    if "pos_embedding" not in shapes:
        return {"image_size": as_pair(size)} if size else {}
    # Try each way in which the tokens before the patches may have entries, and see what is left.
    length = shapes["pos_embedding"][1]
    entries = {"cls": int(network["cls_token"]), "none": 0}
    entries["all"] = entries["cls"] + network["registers"]
    preferred = said.get("prefix_posemb") or ("cls", "none")
    patches = {kind: length - entries[kind] for kind in preferred}
    if size:
        rows, columns = (n // patch for n in as_pair(size))
        fits = {k for k, n in patches.items() if n == rows * columns}
    else:
        fits = {k for k, n in patches.items() if n > 0 and math.isqrt(n) ** 2 == n}
    grids = {patches[kind] for kind in fits}
    if len(grids) != 1:
        known = f"images of {size}" if size else "one square grid"
        raise UnfitError(
            f"its {length} positions are not those of {known}: the size of the images that it was "
            "trained on must be told, (height, width) in pixels",
            {"init_image_size": "..."},
        )
    kind = next(k for k in preferred if k in fits)
    if not size:
        rows = columns = math.isqrt(patches[kind])
    # Without registers both mean the same; "cls" is the usual name for it.
    if kind == "all" and not network["registers"]:
        kind = "cls"
    # Where patches do not divide the images (384 px in patches of 14), a convolution leaves out the
    # last rows and columns of pixels: the images that are seen are smaller.
    return {"image_size": (rows * patch, columns * patch), "prefix_posemb": kind}


def _grid_note(
    system: str, said: Mapping[str, Any], network: Mapping[str, Any], asked: Any
) -> list[str]:
    """For the report: that a cls token was taken to have no position, where nothing tells."""
    # A table for a cls token and an oblong grid may have as many entries: 1 + 2 x 4 is 3 x 3.
    known = asked or said.get("image_size") or "image_size" not in network
    if system != "timm" or known or not network["cls_token"] or network["prefix_posemb"] != "none":
        return []
    rows, columns = (n // network["patch_size"] for n in network["image_size"])
    return [f"positions of {rows} x {columns} patches, and none of the cls token"]


def _size_note(said: Mapping[str, Any], network: Mapping[str, Any], asked: Any) -> list[str]:
    """For the report: that of the images in the config some rows and columns are never seen."""
    named = asked or said.get("image_size")
    seen = network.get("image_size")
    if not named or not seen or as_pair(named) == tuple(seen):
        return []
    return [f"of images of {as_pair(named)} its patches cover {tuple(seen)}: that is its size here"]
