"""Weights wherever they lie: a run of ours, a file or folder of another system, gs://, hf://."""

import dataclasses
import importlib
import shlex
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.config.imports import check_imports, import_modules
from vit_dist.config.recorded import of_best
from vit_dist.data.ops.pipe import Pipe, parse
from vit_dist.model.formats.pretrained import SUFFIXES, open_pretrained
from vit_dist.model.formats.tensors import LazyArray
from vit_dist.model.load_report import LoadReport
from vit_dist.model.unfit import UnfitError
from vit_dist.model.vit import ViT
from vit_dist.model.weights import adapt_weights
from vit_dist.paths import expand, is_remote
from vit_dist.training.checkpoint import Checkpoint, is_checkpoint, open_checkpoint

_HUB = "hf://"
# Files beside the weights that tell their network and how images were scaled for it.
_BESIDE = ("config.json", "preprocessor_config.json")
# Turns the settings that would make weights fit (see UnfitError.settings) into a sentence that says
# how to set them in the command at hand: each command has its own flags.
Hint = Callable[[Mapping[str, Any]], str]


def config_hint(settings: Mapping[str, Any]) -> str:
    """The Hint of train and evaluate: Set --config.model.width=192 --config.init_ignore='...'."""
    # Quoted for the shell, as the user will copy it.
    return "Set " + " ".join(f"--config.{k}={shlex.quote(str(v))}" for k, v in settings.items())


class _Download:
    """A temporary folder, removed when the last reference to this object goes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vit_dist-"))
        # finalize() also runs when Python exits, unlike __del__ of an object that is still there.
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Weights wherever they lie, under our names, and what is known of their network.

    Attributes:
      path: as it was given.
      tensors: name of our variable -> tensor; read one at a time, when np.asarray asks for it.
      network: keys of ViT.get_config(), those that are known.
      unused, unknown, assumed, notes: see formats.pretrained.Pretrained.
      mean, std: by channel, of images in 0..1; None where the file does not tell, and for runs.
      preparation: what a file asks for in preparing images that a plain resize does not do.
      pipe: the pipe by which the run evaluates; None for weights of other systems.
      class_names: in the order of the head's outputs; may be empty.
      checkpoint: the run's; None for weights of other systems.
      download: kept so that the folder of copied files lives as long as the tensors.
      hint: says in messages what to set.
    """

    path: str
    tensors: Mapping[str, LazyArray | np.ndarray]
    network: Mapping[str, Any]
    unused: Sequence[str] = ()
    unknown: Sequence[str] = ()
    assumed: Sequence[str] = ()
    notes: Sequence[str] = ()
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    preparation: str = ""
    pipe: Pipe | None = None
    class_names: Sequence[str] = ()
    checkpoint: Checkpoint | None = None
    download: _Download | None = None
    hint: Hint = config_hint

    def fill(self, model: ViT, *, class_names: Sequence[str] = (), **options: Any) -> LoadReport:
        """Gives the weights to a model.

        Args:
          model: takes the weights.
          class_names: of the data, in the order of its labels. The head is reordered to it, and is
            new where the names differ; () takes the head as it is.
          **options: method, patch_method and ignore of weights.adapt_weights.

        Raises:
          DataError: the weights are of another network; names the file, all that differs, and what
            to set.
        """
        try:
            return adapt_weights(
                model,
                self.tensors,
                source=self.network,
                unused=self.unused,
                unknown=self.unknown,
                classes=(self.class_names, class_names),
                assumed=self.assumed,
                notes=self.notes,
                **options,
            )
        except DataError as error:
            raise _explained(error, self.path, self.hint) from error

    def black_and_white(self, channels: int) -> np.ndarray | None:
        """What pixels of 0 and 255 become, float32 (2, 1 or channels); None where nothing tells."""
        if self.pipe is not None:
            return scaled(self.pipe, channels)
        if self.mean is None or self.std is None:
            return None
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (np.array([[0.0], [1.0]], np.float32) - mean) / std


def _explained(error: DataError, path: str, hint: Hint) -> DataError:
    """The error with the file's name in front, and behind it what to set in this command."""
    text = str(error) if path in str(error) else f"{path}: {error}"
    return DataError(f"{text}. {hint(error.settings)}" if isinstance(error, UnfitError) else text)


def scaled(pipe: Pipe, channels: int) -> np.ndarray:
    """What the pipe's ops on the device make of pixels of 0 and 255, float32 (2, channels)."""
    # A batch of two images of one pixel each, (2, 1, 1, channels).
    pixels = np.array([[[[value] * channels]] for value in (0, 255)], np.uint8)
    return pipe.device(tf.constant(pixels)).numpy()[:, 0, 0]


def open_origin(path: str, *, image_size: Any = None, hint: Hint = config_hint) -> Origin:
    """Opens weights; touches no device and reads no numbers yet.

    Args:
      path: a run's or a checkpoint's folder; a .npz, .safetensors or .pth; a folder of Hugging
        Face's or timm's; each local or gs://; or hf://org/name[/file].
      image_size: pixels, of the images that a file of another system was trained on, where the file
        does not tell; see open_pretrained.
      hint: says in messages what to set; the default is for commands with --config.

    Raises:
      ConfigError: a path of a kind that is not read.
      DataError: nothing there, or nothing that can be used; says what to do.
    """
    # A folder with checkpoints, or one that holds no weights of others, is taken for a run: the
    # message of what is not there then speaks of runs.
    path = of_best(path)
    if not path.startswith(_HUB):
        folder = expand(path, allowed="local paths, gs:// and hf://")
        if is_checkpoint(folder) or not _has_weights(folder):
            return dataclasses.replace(_of_run(str(folder)), hint=hint)
    # Files are read piece by piece, many times: remote ones are copied to this machine first.
    download = None
    if path.startswith(_HUB):
        local = _from_hub(path)
    elif is_remote(path):
        download = _Download()
        local = _copied(epath.Path(path), download.folder)
    else:
        local = Path(expand(path))
    try:
        found = open_pretrained(local, image_size=image_size)
    except DataError as error:
        raise _explained(error, str(local), hint) from error
    return Origin(
        path=path,
        tensors=found.tensors,
        network=found.network,
        unused=found.unused,
        unknown=found.unknown,
        assumed=found.assumed,
        notes=found.notes,
        mean=found.mean,
        std=found.std,
        preparation=found.preparation,
        class_names=found.class_names,
        download=download,
        hint=hint,
    )


def _has_weights(path: epath.Path) -> bool:
    """Whether this is a file of weights by its name, or a folder that holds one."""
    if path.is_dir():
        return any(p.name.endswith(SUFFIXES) for p in path.iterdir())
    return path.exists() or path.name.endswith(SUFFIXES)


def _of_run(path: str) -> Origin:
    """The weights of a run: their moving average where the run has one."""
    checkpoint = open_checkpoint(path, weights=True)
    notes = checkpoint.notes
    # The user's own modules register ops; they have to be imported before the pipe is parsed.
    import_modules(check_imports(notes["config"].get("imports", ())))
    network = notes["model"]
    size, classes = tuple(network["image_size"]), network["num_classes"]
    return Origin(
        path=str(checkpoint.path),
        tensors=checkpoint.weights(),
        network=network,
        pipe=parse(notes["config"]["input"]["eval_ops"], size=size, num_classes=classes),
        class_names=notes.get("class_names", ()),
        checkpoint=checkpoint,
    )


def _copied(path: epath.Path, folder: Path) -> Path:
    """Copies a file and what tells of it, or the weights of a folder, to the local disk."""
    if not path.exists():
        raise DataError(f"there is no {path}")
    files = [path]
    if path.is_dir():
        files = [p for p in path.iterdir() if p.name.endswith((*SUFFIXES, ".json"))]
    else:
        files += [path.parent / name for name in _BESIDE if (path.parent / name).exists()]
    for file in files:
        file.copy(folder / file.name)
    return folder if path.is_dir() else folder / path.name


def _from_hub(path: str) -> Path:
    """Downloads hf://org/name[/file] into the hub's own cache, or finds it there."""
    # An optional library, imported where it is needed.
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ConfigError(
            f"{path} needs the library huggingface_hub: pip install huggingface_hub"
        ) from None
    parts = path.removeprefix(_HUB).split("/")
    if len(parts) < 2 or not all(parts):
        raise ConfigError(f"{path} is not hf://org/name or hf://org/name/file")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    patterns = [file, *_BESIDE] if file else ["model*.safetensors", "*.index.json", *_BESIDE]
    try:
        folder = Path(hub.snapshot_download(repository, allow_patterns=patterns))
        if not file and not any(p.name.endswith(SUFFIXES) for p in folder.iterdir()):
            # Only now PyTorch's files: many repositories hold both, and safetensors is read lazily.
            folder = Path(
                hub.snapshot_download(repository, allow_patterns=["pytorch_model*.bin", *patterns])
            )
    # The library raises errors of its own and of several libraries below it.
    except Exception as error:
        raise DataError(
            f"{path} could not be fetched ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    if file and not (folder / file).exists():
        raise DataError(f"{_HUB}{repository} has no file {file}: see which there are at the hub")
    return folder / file if file else folder
