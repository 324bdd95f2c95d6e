"""One file of arrays, in the safetensors format, written and read piece by piece.

    8 bytes   length of the header, little-endian
    header    JSON: name -> {"dtype", "shape", "data_offsets": [begin, end)}, padded with spaces
    data      the arrays, one after the other, C order, little-endian

The format: https://github.com/huggingface/safetensors#format. The safetensors library makes and
reads such a file in one piece, which is a second copy of the whole state in the host's memory; and
it cannot read from a bucket.
"""

import dataclasses
import functools
import itertools
import json
import math
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack

import numpy as np
from etils import epath

from vit_dist.config.errors import DataError
from vit_dist.model.formats.tensors import LazyArray
from vit_dist.storage.errors import retry
from vit_dist.storage.files import file_size, write_file

# Bytes read at once while checking. A bucket answers each read with one request of about 0.1 s, so
# small pieces would be slow.
_PIECE = 2**24
# The data begins at a multiple of so many bytes, because the safetensors library uses numbers where
# they lie in the file.
_ALIGNMENT = 8

# The format's names of NumPy's types: F32, I64, U8, BOOL. No BF16: NumPy has no such type.
_DTYPES = {
    f"{letter.upper()}{8 * width}": np.dtype(f"<{letter}{width}")
    for letter, widths in (("f", (2, 4, 8)), ("i", (1, 2, 4, 8)), ("u", (1, 2, 4, 8)))
    for width in widths
} | {"BOOL": np.dtype(np.bool_)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Sums:
    """What proves a file whole.

    Attributes:
      size: bytes of the file.
      crc32: of the whole file.
      arrays: name -> CRC-32 of the array's bytes; empty for files of version 0.1, which noted none.
    """

    size: int
    crc32: int
    arrays: Mapping[str, int]


def write_state(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> Sums:
    """Writes the arrays into a file, durably, without a second copy of them; returns its sums."""
    # Wide types first: every array then begins at a multiple of its own width. `sorted` keeps the
    # state's order among equals, so a resume, which asks in that order, reads forwards.
    names = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    header, begin = {}, 0
    for name in names:
        array = arrays[name]
        end = begin + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # -n % 8 is what n lacks to a multiple of 8; the 8 bytes of the length change nothing in that.
    text += b" " * (-len(text) % _ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    total, crc = 0, 0
    each: dict[str, int] = {}

    # A generator: the sums are of the very bytes that go to the file, and no array is copied.
    def parts() -> Iterator[bytes | memoryview]:
        nonlocal total, crc
        total, crc = len(start), zlib.crc32(start)
        yield start
        for name in names:
            data = _bytes_of(arrays[name])
            total, crc, each[name] = total + len(data), zlib.crc32(data, crc), zlib.crc32(data)
            yield data

    write_file(path, parts())
    return Sums(size=total, crc32=crc, arrays=each)


def _bytes_of(array: np.ndarray) -> memoryview:
    # By way of NumPy's view: memoryview.cast refuses arrays of no dimension, or with one of size 0.
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


class StateFile(Mapping[str, np.ndarray]):
    """The arrays of a file by name, each read when it is asked for.

    The file stays open: on a disk it can then be read to the end even if the training run, which
    keeps its newest checkpoints only, removes it meanwhile.

    Args:
      path: of a file that `write_state` or the safetensors library wrote.
      sums: what the manifest notes about the file.

    Raises:
      DataError: the file has another size than noted, or its header is damaged.
      OSError, OpError: it cannot be read.
    """

    def __init__(self, path: epath.PathLike, sums: Sums):
        self._path, self._size, self._sums = epath.Path(path), file_size(path), sums
        if self._size != sums.size:
            raise DataError(f"{path} is damaged: it has {self._size} bytes instead of {sums.size}")
        opened = ExitStack()
        self._file = opened.enter_context(self._path.open("rb"))
        # Closes the file when this object is forgotten, also if the header below turns out damaged.
        self._finalizer = weakref.finalize(self, opened.close)
        self._entries = self._read_header()

    def _read_header(self) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
        """Name -> (dtype, shape, offset in the file), each checked against the file's size."""
        # Nothing in a header is believed before it is checked: a damaged length or offset must not
        # make Python allocate gigabytes or read behind the end.
        length = int.from_bytes(self._file.read(8), "little")
        if not 0 < length <= self._size - 8:
            raise DataError(f"{self._path} is damaged: its header has no right length")
        entries = {}
        try:
            header = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                dtype, shape = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
                begin, end = entry["data_offsets"]
                if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != end - begin:
                    raise ValueError(f"{name} is not {shape} {dtype}")
                if not 0 <= begin <= end <= self._size - 8 - length:
                    raise ValueError(f"{name} lies outside of the file")
                entries[name] = (dtype, shape, 8 + length + begin)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self._path} is damaged: its header ({error})") from None
        return entries

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without reading an array."""
        return {name: shape for name, (_, shape, _) in self._entries.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._entries:
            raise KeyError(name)
        return retry(f"reading {self._path}", functools.partial(self._read, name))

    def _read(self, name: str) -> np.ndarray:
        dtype, shape, offset = self._entries[name]
        array = np.empty(shape, dtype)
        # `into` shares the array's memory, so the bytes are read to where they belong.
        into, done = _bytes_of(array), 0
        for piece in self._pieces(offset, len(into)):
            into[done : done + len(piece)] = piece
            done += len(piece)
        return array

    def close(self) -> None:
        """Closes the file. Nothing can be read any more; a removed file's room becomes free."""
        self._finalizer()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def below(self, prefix: str) -> dict[str, LazyArray]:
        """The arrays whose names begin with `prefix`, by the rest of their names; none is read."""
        return {
            name.removeprefix(prefix): LazyArray(
                shape, functools.partial(self.__getitem__, name), name
            )
            for name, shape in self.shapes.items()
            if name.startswith(prefix)
        }

    def check(self, names: Iterable[str] | None = None) -> None:
        """Proves by checksums that the file is whole, in a constant amount of memory.

        Args:
          names: of the arrays that will be used; only they are read. None for all. Without noted
            checksums of single arrays the whole file is read.

        Raises:
          DataError: the file is damaged.
          OSError, OpError: it cannot be read.
        """
        if names is None or not self._sums.arrays:
            if self._crc(0, self._size) != self._sums.crc32:
                raise DataError(f"{self._path} is damaged: its checksum differs")
            return
        for name in names:
            dtype, shape, offset = self._entries[name]
            crc = self._crc(offset, math.prod(shape) * dtype.itemsize)
            if crc != self._sums.arrays.get(name):
                raise DataError(f"{self._path} is damaged: the checksum of {name} differs")

    def _crc(self, offset: int, length: int) -> int:
        crc = 0
        for piece in self._pieces(offset, length):
            crc = zlib.crc32(piece, crc)
        return crc

    def _pieces(self, offset: int, length: int) -> Iterator[bytes]:
        """The bytes from `offset` on, in pieces."""
        self._file.seek(offset)
        for begin in itertools.count(0, _PIECE):
            wanted = min(_PIECE, length - begin)
            if wanted <= 0:
                return
            try:
                piece = self._file.read(wanted)
            except OSError as error:
                # read() knows a descriptor and no name; the message to the user needs the name.
                error.filename = str(self._path)
                raise
            if len(piece) != wanted:
                raise DataError(f"{self._path} is damaged: it ends early")
            yield piece
