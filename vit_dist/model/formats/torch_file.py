"""PyTorch's zip format (torch.save since 1.6), read without PyTorch and without running pickles.

A pickle names functions and classes, and asks for them to be called. Here only a handful of names
mean anything: those of tensors and their containers. Every other name becomes an inert placeholder,
so a training script's file (with argparse's options, numpy's scalars, the state of an optimizer)
can be read for its weights, and nothing that somebody put into it is imported or run.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vit_dist.config.errors import DataError
from vit_dist.model.formats.tensors import (
    AGAIN,
    LazyArray,
    TensorFile,
    as_float,
    is_floating,
    read_member,
)

_MAX_PICKLE = 2**26  # bytes: names and shapes only; a ViT's takes some 10 kB
_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# Where training scripts keep the weights, best first: the moving average before the weights that
# the optimizer moves, as timm evaluates it; a teacher, as DINO publishes it, before a student.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "state_dict",
    "model",
    "teacher",
    "target_encoder",  # I-JEPA's teacher
    "module",
    "student",
)
# Where they keep their options: timm, DeiT, MAE, DINO; Lightning.
_OPTIONS = ("args", "hyper_parameters", "hparams")
_MAX_DEPTH = 4  # of wrappers in each other; a pickle can hold a dictionary that contains itself


class _StorageType(NamedTuple):
    """A class of torch's storages, such as "FloatStorage": it names the type of numbers."""

    name: str


class _Storage(NamedTuple):
    """Numbers of one type, a member of the zip file."""

    kind: str
    key: str
    length: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count entries, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for an object of a class that means nothing here.

    The unpickler makes objects, calls them, gives them a state and adds entries to them; all of it
    has to go through without an effect. The state is kept: it may be the options of a script.
    """

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes and forgets any arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forgets an entry of what may be a dictionary."""

    def append(self, value: Any) -> None:
        """Forgets an entry of what may be a list."""

    def extend(self, values: Any) -> None:
        """Forgets entries of what may be a list."""

    def add(self, value: Any) -> None:
        """Forgets an entry of what may be a set."""


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    # The arguments come from the file: nothing is believed before it is checked here and in _check.
    numbers = [offset, *shape, *strides]
    if len(shape) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor without a proper shape")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def _dictionary(*factory: Any) -> dict[Any, Any]:
    return {}


class _Function(NamedTuple):
    """A function that a pickle may call but not change: a NamedTuple has no attributes to set."""

    run: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)


# (module, name) in a pickle -> what is called in its place. Nothing here imports torch.
_KNOWN = {
    ("collections", "OrderedDict"): _Function(collections.OrderedDict),
    ("collections", "defaultdict"): _Function(_dictionary),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch", "Size"): _Function(tuple),
}


class _Unpickler(pickle.Unpickler):
    """Knows tensors, numbers, text and their containers; all else that it makes is inert."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self._inert: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Nothing is ever imported: a name is looked up in tables of ours, or gets a placeholder.
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _StorageType(name)
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        return self._inert.setdefault((module, name), type("Inert", (_Inert,), {}))

    def persistent_load(self, pid: Any) -> _Storage:
        # torch.save refers to a storage as ("storage", class, key, device, number of entries).
        tag, kind, key, _, count = pid
        if tag != "storage" or not isinstance(kind, _StorageType) or not isinstance(count, int):
            raise pickle.UnpicklingError("it refers to something that is no tensor's storage")
        return _Storage(kind.name, str(key), count)


def open_torch(path: Path) -> TensorFile:
    """Opens a file of torch.save: a state dict, or what a training script wrapped around one.

    Raises:
      DataError: it is damaged, or holds no tensors by name.
    """
    with zipfile.ZipFile(path) as archive:
        # As the zip file's directory says; nothing is unpacked yet.
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    # Every member lies in one folder, of whatever name.
    member = next(name for name in sizes if name.endswith("data.pkl"))
    root = member.removesuffix("data.pkl")
    # Before it is read, as the unpickler's memory grows with it.
    if sizes[member] > _MAX_PICKLE:
        raise DataError(
            f"{path}: {member} has {sizes[member]:,} bytes, which no checkpoint needs{AGAIN}"
        )
    # Written by newer versions of torch; the storages below are read as little-endian.
    order = f"{root}byteorder"
    if order in sizes and bytes(read_member(path, order)).strip() != b"little":
        raise DataError(f"{path} was written on a big-endian machine; save it on another")
    data = read_member(path, member)
    try:
        content = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise DataError(
            f"{path} is damaged, or holds no tensors as torch.save writes them "
            f"({type(error).__name__}: {error}){AGAIN}"
        ) from error
    found, taken = _find_tensors(content)
    if not found:
        what = "a whole model" if isinstance(content, _Inert) else "no tensors by name"
        raise DataError(f"{path} holds {what}: save the model's state_dict()")
    tensors = {}
    for name, tensor in found.items():
        file = f"{root}data/{tensor.storage.key}"
        _check(f"{path}: {name}", tensor, sizes.get(file))
        floating = is_floating(_DTYPES[tensor.storage.kind])
        tensors[name] = LazyArray(tensor.shape, _reader(path, file, tensor), name, floating)
    return TensorFile(
        tensors, "pth", wrapper=taken, config=_config(content), notes=_notes(content, taken)
    )


def _find_tensors(content: Any, depth: int = 0) -> tuple[dict[str, _Tensor], str]:
    """The tensors of a state dict, and the key under which it was, "" for none."""
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return {}, ""
    # Wrappers come first: a dictionary with a state dict may also hold single tensors, such as the
    # number of the epoch.
    for key in _WRAPPERS:
        found, _ = _find_tensors(content.get(key), depth + 1)
        if found:
            return found, key
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, _Tensor)}, ""


def _notes(content: Any, taken: str) -> list[str]:
    """For the report: which of several sets of weights was taken."""
    if not taken:
        return []
    # At the outermost level, where `taken` was chosen.
    others = [k for k in _WRAPPERS if k != taken and _find_tensors(content.get(k), 1)[0]]
    return [f"the file's {taken!r} is taken, not its {' and '.join(others)}"] if others else []


def _config(content: Any) -> dict[str, Any]:
    """What a training script noted of its network, as timm's config.json would say it."""
    if not isinstance(content, Mapping):
        return {}
    # argparse's Namespace, which is inert here with its state, or a dictionary.
    found: Any = next((content[key] for key in _OPTIONS if key in content), {})
    options = found.state if isinstance(found, _Inert) else found
    options = options if isinstance(options, Mapping) else {}
    # timm writes "arch"; DeiT, MAE and DINO only keep their command line, with --model or --arch.
    names = (content.get("arch"), *(options.get(key) for key in ("model", "arch", "model_name")))
    name = next((n for n in names if isinstance(n, str) and n), None)
    if name is None:
        return {}
    config: dict[str, Any] = {"architecture": name}
    if isinstance(options.get("model_kwargs"), Mapping):
        # timm's --model-kwargs and --gp, as its train.py stores them.
        config["model_args"] = dict(options["model_kwargs"])
    if isinstance(options.get("gp"), str):
        config["global_pool"] = options["gp"]
    return config


def _check(where: str, tensor: _Tensor, size: int | None) -> None:
    storage = tensor.storage
    if storage.kind not in _DTYPES:
        raise DataError(
            f"{where} is a {storage.kind}, which is not read: save it as float32, float16 or "
            "bfloat16"
        )
    if size is None or size != storage.length * _DTYPES[storage.kind].itemsize:
        raise DataError(f"{where} is damaged or was cut: its storage has {size} bytes{AGAIN}")
    # The largest index that the strides reach must lie in the storage.
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if math.prod(tensor.shape) > storage.length or tensor.offset + reach >= max(storage.length, 1):
        raise DataError(f"{where} is damaged: shape {tensor.shape} reaches past its storage{AGAIN}")


def _reader(path: Path, file: str, tensor: _Tensor):
    def read() -> np.ndarray:
        # A tensor may be any view of its storage, such as a transposed one.
        flat = np.frombuffer(read_member(path, file), _DTYPES[tensor.storage.kind])
        strides = [s * flat.itemsize for s in tensor.strides]
        # Safe, as _check has compared the largest index with the storage.
        view = np.lib.stride_tricks.as_strided(
            flat[tensor.offset :], tensor.shape, strides, writeable=False
        )
        return as_float(view)

    return read
