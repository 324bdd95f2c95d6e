"""PyTorch's zip format (torch.save since 1.6), read without PyTorch and without running pickles.

The pickle in such a file may name nothing but tensors and their containers: what torch.load allows
with weights_only=True. Anything else is refused by name.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vit_dist.model.formats.tensors import AGAIN, LazyArray, TensorFile, as_float, read_member

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
# Where training scripts keep the weights; the moving average goes before, as in timm.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "module")


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    numbers = [offset, *shape, *strides]
    if len(shape) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor without a proper shape")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Knows tensors, numbers, text and their containers; nothing that it builds runs code."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch", "Size"): tuple,
        }
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        tag, dtype, key, _, count = pid
        if tag != "storage" or not isinstance(dtype, np.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError(f"it refers to {pid!r}")
        return _Storage(dtype, str(key), count)


def open_torch(path: Path) -> TensorFile:
    """Opens a file of torch.save.

    Raises:
      ValueError: its pickle names anything but tensors, or it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    member = next(name for name in sizes if name.endswith("data.pkl"))
    root = member.removesuffix("data.pkl")
    if sizes[member] > _MAX_PICKLE:
        raise ValueError(
            f"{path}: {member} has {sizes[member]:,} bytes, which no checkpoint needs{AGAIN}"
        )
    order = f"{root}byteorder"
    if order in sizes and bytes(read_member(path, order)).strip() != b"little":
        raise ValueError(f"{path} was written on a big-endian machine; save it on another")
    data = read_member(path, member)
    try:
        content = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise ValueError(
            f"{path} is not opened: its pickle holds more than tensors, or is damaged ({error}). "
            "Where you trust it, save its tensors alone with PyTorch: "
            "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
        ) from error
    found = _find_tensors(content)
    if not found:
        raise ValueError(f"{path} holds no tensors by name: save a model's state_dict()")
    tensors = {}
    for name, tensor in found.items():
        file = f"{root}data/{tensor.storage.key}"
        _check(f"{path}: {name}", tensor, sizes.get(file))
        tensors[name] = LazyArray(tensor.shape, _reader(path, file, tensor), name)
    return TensorFile(tensors, "pth")


def _find_tensors(content: Any) -> dict[str, _Tensor]:
    """The tensors of a state dict, or of the first one that is wrapped in it."""
    if not isinstance(content, Mapping):
        return {}
    own = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, _Tensor)}
    for key in _WRAPPERS:
        if not own and isinstance(content.get(key), Mapping):
            own = _find_tensors(content[key])
    return own


def _check(where: str, tensor: _Tensor, size: int | None) -> None:
    storage = tensor.storage
    if size is None or size != storage.length * storage.dtype.itemsize:
        raise ValueError(f"{where} is damaged or was cut: its storage has {size} bytes{AGAIN}")
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if math.prod(tensor.shape) > storage.length or tensor.offset + reach >= max(storage.length, 1):
        raise ValueError(
            f"{where} is damaged: shape {tensor.shape} reaches past its storage{AGAIN}"
        )


def _reader(path: Path, file: str, tensor: _Tensor):
    def read() -> np.ndarray:
        flat = np.frombuffer(read_member(path, file), tensor.storage.dtype)
        strides = [s * flat.itemsize for s in tensor.strides]
        view = np.lib.stride_tricks.as_strided(
            flat[tensor.offset :], tensor.shape, strides, writeable=False
        )
        return as_float(view)

    return read
