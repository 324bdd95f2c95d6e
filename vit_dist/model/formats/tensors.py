"""Tensors that lie in files, read when they are asked for.

Every size is checked against the file before memory is taken for it.
"""

import dataclasses
import math
import mmap
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from vit_dist.config.errors import DataError

# Weights hardly compress: a file that unpacks to more than so many times its size is no checkpoint.
# SLACK (bytes) is for tensors of zeros, such as the heads of the old ImageNet-21k files (67 MB).
MAX_GROWTH = 20
SLACK = 2**28
AGAIN = "; fetch or copy it again"  # what to do about a damaged file
_CHUNK = 2**20  # bytes read at once, so that decompression and checksums need no second copy


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """A tensor of a file: its shape now, its numbers (np.asarray) when they are wanted.

    Attributes:
      shape: of what `read` returns.
      read: reads the numbers from the file, anew at each call.
      source: name in the file of the tensor that the numbers come from. Several arrays may be cut
        from one, such as q, k and v from a fused matrix; those read in a row cost one reading.
      floating: whether the file keeps floating-point numbers; integers are steps of a quantised
        file, whose scale lies elsewhere, or counters.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    source: str = ""
    floating: bool = True

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # NumPy calls this for np.asarray(lazy); nothing is kept, so each call reads.
        return np.asarray(self.read(), dtype)


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What a file holds.

    Attributes:
      tensors: by the file's own names.
      kind: "npz", "safetensors" or "pth".
      metadata: text that a safetensors file carries besides.
      wrapper: the key of a training script's dictionary under which the tensors were; "" for none.
      config: what the training script noted of the network, as timm's config.json would say it.
      notes: lines for the load report.
    """

    tensors: Mapping[str, LazyArray]
    kind: str
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    wrapper: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


def open_zip(path: Path) -> zipfile.ZipFile:
    """Opens a zip file.

    Raises:
      DataError: it is damaged or cut, or would unpack to far more than a checkpoint can.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is damaged or was cut: {error}{AGAIN}") from None
    # As the directory at the end of the file claims; no more than that is unpacked later.
    size = sum(info.file_size for info in archive.infolist())
    limit = MAX_GROWTH * path.stat().st_size + SLACK
    if size > limit:
        archive.close()
        raise DataError(
            f"{path} would unpack to {size:,} bytes, more than {MAX_GROWTH} times its own size: a "
            "zip bomb, no checkpoint. Fetch it from where it was published"
        )
    return archive


def read_member(path: Path, name: str) -> memoryview:
    """A member of a zip file, its checksum verified.

    Raises:
      DataError: it is damaged or cut.
    """
    try:
        with open_zip(path) as archive, archive.open(name) as member:
            return read_exactly(member, archive.getinfo(name).file_size)
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, RuntimeError) as error:
        raise DataError(f"{path}: {name} is damaged or was cut ({error}){AGAIN}") from None
    # What a decompressor raises depends on the method that a member was packed by.
    except Exception as error:  # zlib.error, lzma.LZMAError, RuntimeError of encrypted files
        raise DataError(f"{path}: {name} cannot be read ({error}){AGAIN}") from error


def read_exactly(file: IO[bytes], size: int) -> memoryview:
    """The next `size` bytes, in memory that goes back to the system with the last use of them.

    A heap would keep it, in pieces between tensors that stay: a tenth of a large file in the end.
    """
    # An anonymous map for large tensors, as the docstring says; small ones are cheaper on the heap.
    data = memoryview(mmap.mmap(-1, size) if size >= _CHUNK else bytearray(size))
    for start in range(0, size, _CHUNK):
        part = data[start : start + _CHUNK]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise EOFError("it ends early")
    return data


def check_size(where: str, shape: tuple[int, ...], dtype: np.dtype, size: int) -> None:
    """Raises DataError unless `size` bytes are what the shape needs."""
    # Python's integers do not overflow, whatever shape a damaged file claims.
    needed = math.prod(shape) * dtype.itemsize
    # The product of two negative sizes would be positive.
    if min(shape, default=0) < 0 or needed != size:
        raise DataError(f"{where} is damaged or was cut: {shape} {dtype} in {size:,} bytes{AGAIN}")


def as_float(array: np.ndarray) -> np.ndarray:
    """Floating tensors as float32, others as they are; float32 is not copied."""
    return array.astype(np.float32, copy=False) if is_floating(array.dtype) else array


def is_floating(dtype: np.dtype) -> bool:
    """Whether numbers of this type are floating-point ones."""
    # NumPy does not count bfloat16, which it does not know, among the floating types.
    return dtype == ml_dtypes.bfloat16 or np.issubdtype(dtype, np.floating)
