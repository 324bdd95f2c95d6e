"""The files of sets resized beforehand: written, and read back to be compared."""

import io
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath

from vit_dist import paths
from vit_dist.config.errors import DataError
from vit_dist.data.sources import array_record, raw
from vit_dist.data.sources.shard_reader import OpenShard
from vit_dist.storage.files import write_whole


def check(path: epath.Path, entry: dict[str, Any], records: Iterable[bytes]) -> None:
    """Compares records as they were read back with the entry of what was written.

    Raises:
      DataError: They are others, or the file is damaged; says what to remove.
    """
    count = crc = 0
    try:
        for record in records:
            count, crc = count + 1, zlib.crc32(record, crc)
    except ValueError as error:
        raise DataError(f"{error or path}: remove {path} and convert again") from error
    if (count, crc) != (entry["count"], entry["crc32"]):
        raise DataError(
            f"{path} holds {count} records with a checksum of {crc:08x} instead of "
            f"{entry['count']} with {entry['crc32']:08x}: remove it and convert again"
        )


class JpegShards:
    """Files of array_record's format; each has its name when it is whole."""

    def __init__(self, out: epath.Path, count: int):
        self._out, self._count = out, count

    def path(self, number: int) -> epath.Path:
        """Returns the file of a shard."""
        return self._out / array_record.shard_name(number, self._count)

    def write(self, path: epath.Path, records: Iterator[bytes]) -> None:
        """Writes a shard."""
        array_record.write_shard(path, records)

    def read(self, path: epath.Path) -> Iterator[bytes]:
        """Yields the records of a shard; ValueError where it is damaged."""
        with OpenShard(str(path)) as shard:
            for number in range(len(shard)):
                yield shard.read([number])[0]

    def finish(self) -> None:
        """Nothing is left to do: each record holds its label."""


class RawShards:
    """Files of raw pixels; `finish` writes the table by which their records are found."""

    def __init__(self, out: epath.Path, count: int):
        self._out, self._count = out, count
        self._headers: list[raw.Header] = []  # of all records read, which are read in their order

    def path(self, number: int) -> epath.Path:
        """Returns the file of a shard."""
        return self._out / raw.shard_name(number, self._count)

    def write(self, path: epath.Path, records: Iterator[bytes]) -> None:
        """Writes a shard."""
        temporary = paths.temporary_name(path)
        # Under another name until it is whole, as array_record's shards.
        with tf.io.TFRecordWriter(os.fsencode(temporary)) as writer:
            for record in records:
                writer.write(record)
        temporary.replace(path)

    def read(self, path: epath.Path) -> Iterator[bytes]:
        """Yields the records of a shard; ValueError where it is damaged."""
        try:
            with tf.device("CPU:0"):
                for record in tf.data.TFRecordDataset(os.fsencode(path)).as_numpy_iterator():
                    self._headers.append(raw.header_of(record))
                    yield record
        except tf.errors.DataLossError as error:
            raise DataError(f"{path}: {error.message}") from error

    def finish(self) -> None:
        """Writes heights, widths and labels."""
        # A row for each record becomes an array for each field. The reshape is for no records:
        # their array has no second axis.
        columns = np.array(self._headers, np.int32).reshape(-1, len(raw.Header._fields)).T
        buffer = io.BytesIO()
        np.savez(buffer, **dict(zip(raw.Header._fields, columns, strict=True)))
        write_whole(self._out / raw.SIZES, buffer.getvalue())
