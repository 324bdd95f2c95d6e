"""Weights wherever they lie: a run of ours, a file or folder of another system, gs://, hf://."""

import dataclasses
import importlib
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath

from vit_dist.config.modules import check_modules, import_modules
from vit_dist.data.ops.pipe import Pipe, parse
from vit_dist.model.formats.pretrained import open_pretrained
from vit_dist.model.formats.tensors import LazyArray
from vit_dist.model.vit import ViT
from vit_dist.model.weights import LoadReport, adapt_weights
from vit_dist.paths import is_remote
from vit_dist.training.checkpoint import Checkpoint, is_checkpoint, open_checkpoint

_HUB = "hf://"
_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")
_WANTED = ("config.json", "preprocessor_config.json")  # of a repository, beside the weights


class _Download:
    """A folder that goes when the last reference to it does."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vit_dist-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Weights to begin with, under our names, and what is known of their network.

    Attributes:
      path: as it was given.
      tensors: read one at a time where they come from a file of another system.
      network: ViT.get_config()'s keys, as far as known.
      unused, unknown: names in the file; see formats.pretrained.Pretrained.
      mean, std: of images in 0..1; None where the file does not tell, and for runs of ours.
      pipe: a run's own for evaluation.
      class_names: in the order of the head's outputs; may be empty.
      checkpoint: if it is a run of ours.
      download: removed when the last reference to it goes.
    """

    path: str
    tensors: Mapping[str, LazyArray | np.ndarray]
    network: Mapping[str, Any]
    unused: Sequence[str] = ()
    unknown: Sequence[str] = ()
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    pipe: Pipe | None = None
    class_names: Sequence[str] = ()
    checkpoint: Checkpoint | None = None
    download: _Download | None = None

    def fill(self, model: ViT, **options: Any) -> LoadReport:
        """Gives the weights to a model; `options` of weights.adapt_weights.

        Raises:
          ValueError: they are another network's; names the file, all that differs, what to set.
        """
        try:
            return adapt_weights(
                model,
                self.tensors,
                source=self.network,
                unused=self.unused,
                unknown=self.unknown,
                **options,
            )
        except ValueError as error:
            text = str(error)
            raise ValueError(text if self.path in text else f"{self.path}: {text}") from error

    def black_and_white(self, channels: int) -> np.ndarray | None:
        """What pixels of 0 and 255 become: (2, 1 or channels); None where nothing tells."""
        if self.pipe is not None:
            return scaled(self.pipe, channels)
        if self.mean is None or self.std is None:
            return None
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (np.array([[0.0], [1.0]], np.float32) - mean) / std


def scaled(pipe: Pipe, channels: int) -> np.ndarray:
    """What the pipe's op on the device makes of pixels of 0 and 255: (2, channels)."""
    pixels = np.array([[[[value] * channels]] for value in (0, 255)], np.uint8)
    return pipe.device(tf.constant(pixels)).numpy()[:, 0, 0]


def open_origin(path: str, *, image_size: Any = None) -> Origin:
    """Opens weights; touches no device.

    Args:
      path: a run's or a checkpoint's folder; a .npz, .safetensors or .pth; a folder of Hugging
        Face's or timm's; each local or gs://; or hf://org/name[/file].
      image_size: of a file of another system that does not tell; see open_pretrained.

    Raises:
      ValueError: nothing there, or nothing that can be used; says what to do.
    """
    if not path.startswith(_HUB):
        try:
            folder = epath.Path(path)
        except KeyError:
            raise ValueError(f"{path}: only local paths, hf:// and buckets (gs://) work") from None
        if is_checkpoint(folder) or not _has_weights(folder):
            return _of_run(path)
    download = None
    if path.startswith(_HUB):
        local = _from_hub(path)
    elif is_remote(path):
        download = _Download()
        local = _copied(epath.Path(path), download.folder)
    else:
        local = Path(path)
    found = open_pretrained(local, image_size=image_size)
    return Origin(
        path=path,
        tensors=found.tensors,
        network=found.network,
        unused=found.unused,
        unknown=found.unknown,
        mean=found.mean,
        std=found.std,
        class_names=found.class_names,
        download=download,
    )


def _has_weights(path: epath.Path) -> bool:
    if path.is_dir():
        return any(p.name.endswith(_SUFFIXES) for p in path.iterdir())
    return path.exists() or path.name.endswith(_SUFFIXES)


def _of_run(path: str) -> Origin:
    checkpoint = open_checkpoint(path)
    averaged = any(name.startswith("ema/") for name in checkpoint.arrays)
    prefix = "ema/" if averaged else "model/"
    arrays = {
        name.removeprefix(prefix): array
        for name, array in checkpoint.arrays.items()
        if name.startswith(prefix)
    }
    notes = checkpoint.notes
    import_modules(
        check_modules(notes["config"].get("modules", ()))
    )  # they register ops of the pipe
    network = notes["model"]
    size, classes = tuple(network["image_size"]), network["num_classes"]
    return Origin(
        path=str(checkpoint.path),
        tensors=arrays,
        network=network,
        pipe=parse(notes["config"]["input"]["eval_ops"], size=size, num_classes=classes),
        class_names=notes.get("class_names", ()),
        checkpoint=checkpoint,
    )


def _copied(path: epath.Path, folder: Path) -> Path:
    """The file, or the files of the folder that matter, on the local disk."""
    if not path.exists():
        raise ValueError(f"there is no {path}")
    files = [path]
    if path.is_dir():
        files = [p for p in path.iterdir() if p.name.endswith((*_SUFFIXES, ".json"))]
    else:
        files += [path.parent / name for name in _WANTED if (path.parent / name).exists()]
    for file in files:
        file.copy(folder / file.name)
    return folder if path.is_dir() else folder / path.name


def _from_hub(path: str) -> Path:
    """Downloads hf://org/name[/file] into the hub's own cache, or finds it there."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(
            f"{path} needs the library huggingface_hub: pip install huggingface_hub"
        ) from None
    parts = path.removeprefix(_HUB).split("/")
    if len(parts) < 2 or not all(parts):
        raise ValueError(f"{path} is not hf://org/name or hf://org/name/file")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    patterns = [file, *_WANTED] if file else ["model*.safetensors", "*.index.json", *_WANTED]
    try:
        folder = Path(hub.snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the library raises its own and those of several others
        raise ValueError(
            f"{path} could not be fetched ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    if file and not (folder / file).exists():
        raise ValueError(f"{_HUB}{repository} has no file {file}: see which there are at the hub")
    return folder / file if file else folder
