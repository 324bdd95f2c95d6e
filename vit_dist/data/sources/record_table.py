"""Where the records of TFRecord files begin: found by one scan, kept beside the files."""

import io
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath

from vit_dist.config.errors import DataError
from vit_dist.data.sources.fingerprint import checksum, printable
from vit_dist.storage.errors import FAILURES, cause
from vit_dist.storage.files import file_size, read_arrays, write_whole

# Bytes around a record's data. Before it: its length (uint64) and a checksum of the length
# (uint32); behind it: a checksum of the data (uint32).
HEADER, FOOTER = 12, 4
NUM_THREADS = 32  # for scanning files, which waits rather than computes
READ_AHEAD = 1 << 16  # bytes read at a time while scanning: small records need no seek each
CHUNK = 1 << 20  # bytes unpacked at a time
MAX_RECORD = 1 << 30  # bytes; protobuf takes 2 GiB at most, and no image comes near
# zlib's code for the format of a compressed file: | 16 means a GZIP header.
WINDOW_BITS = {"GZIP": zlib.MAX_WBITS | 16, "ZLIB": zlib.MAX_WBITS}
SUFFIX = ".vit_dist_index.npz"  # of tables; a pattern of data files may match them


class Table(NamedTuple):
    """What a scan of TFRecord files found."""

    offsets: list[np.ndarray]  # per file, int64: where each record begins, unpacked if compressed
    sizes: list[int]  # of each file in bytes
    compression: str  # of all files: "", "GZIP" or "ZLIB"


def open_table(
    files: Sequence[epath.Path], name: str, check: Callable[[int], None] = lambda count: None
) -> Table:
    """Returns where the records of each file begin, from the table beside the files or a scan.

    Args:
      files: The table lies beside the first of them.
      name: What the table is called after, such as the pattern of the files.
      check: Is given the number of records before a table is kept; may raise.

    Raises:
      DataError: A file has changed since the table was made, or ends within a record.
    """
    # Called after the pattern, so that several sets can lie in one folder.
    path = files[0].parent / f"{checksum([name]):08x}{SUFFIX}"
    sizes = [file_size(file) for file in files]
    if path.exists():
        table = _read_table(path, files, sizes)
        check(sum(map(len, table.offsets)))
        return table
    logging.info("indexing %d files %s", len(files), name)
    compression = compression_of(files[0])
    offsets = []
    # pool.map gives the results in the order of the files.
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for starts in pool.map(lambda file: scan(file, compression), files):
            offsets.append(starts)
            logging.log_every_n_seconds(
                logging.INFO, "indexed %d of %d files", 10, len(offsets), len(files)
            )
    # With the sizes from before the scan: a file that grew meanwhile is noticed at the next
    # opening.
    table = Table(offsets, sizes, compression)
    check(sum(map(len, offsets)))  # before a table of wrong numbers is kept
    _keep(table, path, files)
    return table


def _keep(table: Table, path: epath.Path, files: Sequence[epath.Path]) -> None:
    columns = {_column(f.name): starts for f, starts in zip(files, table.offsets, strict=True)}
    sizes = {file.name: size for file, size in zip(files, table.sizes, strict=True)}
    buffer = io.BytesIO()
    # "at/<file>" holds a file's offsets. Names and sizes are JSON, because NumPy would store a dict
    # as a pickle.
    np.savez(
        buffer,
        allow_pickle=False,
        sizes=np.array(json.dumps(sizes)),
        compression=np.array(table.compression),
        **columns,
    )
    try:
        write_whole(path, buffer.getvalue())
    except FAILURES as error:  # a folder or bucket that may only be read: it costs time alone
        logging.warning(
            "cannot keep the index as %s, the next start scans again: %s", path, cause(error)
        )


def _column(name: str) -> str:
    """Returns what a table calls the offsets of a file, whose name need not be UTF-8."""
    return f"at/{printable(name)}"


def _read_table(path: epath.Path, files: Sequence[epath.Path], sizes: list[int]) -> Table:
    stored = read_arrays(path, remedy="remove it")
    try:
        known = json.loads(str(stored["sizes"]))
        offsets = [stored[_column(file.name)] for file in files if file.name in known]
        # Older tables have no such entry: compressed files were not read then.
        compression = str(stored["compression"]) if "compression" in stored else ""
    except (ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it") from error
    found = {file.name: size for file, size in zip(files, sizes, strict=True)}
    # Over the names of both: a file may also have been added or removed.
    for name in sorted(set(known) | set(found)):
        if known.get(name) != found.get(name):
            raise DataError(
                f"file {path.parent / name} has {found.get(name, 'no')} bytes, and had "
                f"{known.get(name, 'no')} when it was indexed: it has been cut or replaced. "
                f"Copy it again; if the change is meant, remove {path}"
            )
    return Table(offsets, sizes, compression)


def compression_of(file: epath.Path) -> str:
    """Returns "GZIP" or "ZLIB" if the file is compressed as a whole, else "".

    TFRecord files do not tell. The first bytes of one that is not compressed may look like GZIP by
    chance, so what counts is whether unpacking them gives as many bytes as a record's header has.
    """
    with file.open("rb") as opened:
        begin = opened.read(CHUNK)
    for name, bits in WINDOW_BITS.items():
        try:
            # The second argument is the most that is unpacked.
            unpacked = zlib.decompressobj(bits).decompress(begin, HEADER)
        except zlib.error:
            continue
        if len(unpacked) == HEADER:
            return name
    return ""


def scan(path: epath.Path, compression: str = "") -> np.ndarray:
    """Returns the offsets of all records, int64: in the unpacked file, if it is compressed.

    Raises:
      DataError: The file ends within a record, or cannot be unpacked.
    """
    with path.open("rb") as file:
        return _scan_packed(path, file, compression) if compression else _scan(path, file)


def _scan(path: epath.Path, file) -> np.ndarray:
    size, offset = file_size(path), 0
    starts: list[int] = []
    # What was read last, and the byte of the file at which it begins.
    window, begin = b"", 0
    while offset < size:
        # If the next header is not within it: seek there, past the record's data.
        if not begin <= offset <= begin + len(window) - HEADER:
            file.seek(offset)
            window, begin = file.read(READ_AHEAD), offset
        header = window[offset - begin : offset - begin + HEADER]
        # A rest that is too short for a header is treated as a record that is too long.
        length = struct.unpack("<Q", header[:8])[0] if len(header) == HEADER else size
        # A damaged length leads beyond the end, like a file that was cut.
        if offset + HEADER + length + FOOTER > size:
            raise DataError(
                f"file {path} ends within its record {len(starts)} (at byte {offset} of {size})"
                ": it has been cut, or is no TFRecord file; copy it again, or give a pattern that "
                "leaves it out"
            )
        starts.append(offset)
        offset += HEADER + length + FOOTER
    return np.array(starts, np.int64)


def read_unverified(path: epath.Path, offset: int, compression: str = "") -> bytes:
    """Returns the record that begins at a byte (unpacked), in Python and without its checksums.

    Of a compressed file all that comes before is unpacked, too.

    Raises:
      DataError: The file ends before the record does, or cannot be unpacked.
    """
    with path.open("rb") as file:
        opened = file
        try:
            if compression:
                opened = io.BufferedReader(_Unpacked(file, WINDOW_BITS[compression]), CHUNK)
                _skip(opened, offset)
            else:
                opened.seek(offset)
            header = opened.read(HEADER)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == HEADER else -1
            # A damaged header may say any length, for which no memory must be taken.
            record = opened.read(length) if 0 <= length <= MAX_RECORD else b""
        except (EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be unpacked: {error}") from error
        if len(record) != length:
            raise DataError(f"{path} holds no whole record at byte {offset}")
        return record


def _skip(opened, count: int) -> int:
    """Reads on by so many bytes; returns how many are missing."""
    while count and (skipped := opened.read(min(count, CHUNK))):
        count -= len(skipped)
    return count


def _scan_packed(path: epath.Path, file, compression: str) -> np.ndarray:
    """Does what `_scan` does for a compressed file, which must be unpacked from its beginning."""
    unpacked = io.BufferedReader(_Unpacked(file, WINDOW_BITS[compression]), CHUNK)
    starts: list[int] = []
    offset = 0
    try:
        # Seeking is impossible: all is unpacked, and everything but the headers is dropped.
        while header := unpacked.read(HEADER):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == HEADER else 0
            # What _skip could not read, or a header that is too short, is missing at the end.
            if _skip(unpacked, length + FOOTER) or len(header) < HEADER:
                raise EOFError("it ends within a record")
            starts.append(offset)
            offset += HEADER + length + FOOTER
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"file {path} ({compression}) cannot be unpacked behind its record {len(starts)}: "
            f"{error}; copy it again"
        ) from error
    return np.array(starts, np.int64)


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file, from its beginning on.

    Reading raises EOFError where the file was cut, and zlib.error where it is damaged.
    """

    def __init__(self, file, window_bits: int):
        self._file, self._bits = file, window_bits
        self._member = zlib.decompressobj(window_bits)
        self._data = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        # A member is one compressed stream; a file holds one or several. What zlib has not used of
        # the last read is the beginning of the next member.
        while not self._data:
            packed = self._member.unused_data or self._file.read(CHUNK)
            # The file ends behind a whole member, as it should; within one, it was cut.
            if not packed and self._member.eof:
                return 0
            if not packed:
                raise EOFError("it has been cut")
            if self._member.eof:  # the next member: GZIP files can be joined by appending
                self._member = zlib.decompressobj(self._bits)
            self._data = memoryview(self._member.decompress(packed))
        count = min(len(buffer), len(self._data))
        buffer[:count], self._data = self._data[:count], self._data[count:]
        return count
