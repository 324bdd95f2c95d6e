"""Images stored as pixels, of which a crop takes its rows alone: nothing is decoded.

    <folder>/<split>/00003-of-00008.tfrecord    one record an image: a header, then its pixels
    <folder>/<split>/images.npz                 heights, widths and labels, which tell the places
    <folder>/<split>/shards.json                classes, what was done to the images, the shards

`python -m vit_dist.convert --short_side=N --format=raw` writes it. TFRecord is only the container:
TensorFlow reads a record by its place and verifies its checksum without calling Python.
"""

import os
import struct
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from etils import epath

from vit_dist import paths
from vit_dist.config.errors import DataError
from vit_dist.data.ops.windows import Windowed
from vit_dist.data.sources import source as base
from vit_dist.data.sources.preparation import TABLE, preparation_of, read_table
from vit_dist.data.sources.record_table import read_unverified
from vit_dist.data.sources.records import load_record, read_record
from vit_dist.storage.files import exists, file_size, read_arrays

SIZES = "images.npz"
# Before the pixels of each image: MAGIC, height, width, label. In training the table tells these;
# the conversion goes by the headers when it reads back what it wrote.
_HEADER = struct.Struct("<4sIIi")
_MAGIC = b"RAW1"
# What TFRecord adds to a record: its length and a checksum before it, another one behind it.
_AROUND = 8 + 4 + 4


def shard_name(number: int, count: int) -> str:
    """Returns the name of a shard's file, e.g. 00003-of-00008.tfrecord."""
    return f"{number:05d}-of-{count:05d}.tfrecord"


class Header(NamedTuple):
    """What stands before the pixels."""

    height: int
    width: int
    label: int


def make_record(pixels: np.ndarray, label: int) -> bytes:
    """Returns the record of an image, (H, W, 3) uint8."""
    height, width, _ = pixels.shape
    return _HEADER.pack(_MAGIC, height, width, label) + np.ascontiguousarray(pixels).tobytes()


def header_of(record: bytes) -> Header:
    """Returns the header of a record; DataError where it is none of make_record's."""
    if len(record) >= _HEADER.size and record.startswith(_MAGIC):
        _, *found = _HEADER.unpack(record[: _HEADER.size])
        header = Header(*found)
        if len(record) == _HEADER.size + header.height * header.width * 3:
            return header
    raise DataError(f"{base.CORRUPT}: a record is no image of raw pixels")


class _Stored(Windowed):
    """An image of a raw set, in a graph or eagerly."""

    def __init__(self, place: dict[str, tf.Tensor]):
        """Args: place: "file", () string, and "at", "height", "width", () int64; see `fetch`."""
        self._place = place

    def size(self) -> tf.Tensor:
        height, width = self._place["height"], self._place["width"]
        return tf.cast(tf.stack([height, width, 3]), tf.int32)

    def window(self, begin: tf.Tensor, extent: tf.Tensor) -> tf.Tensor:
        record = read_record(self._place["file"], self._place["at"])
        width = tf.cast(self._place["width"], tf.int32)
        # The record is read and verified as a whole; of its pixels, only the window's rows are
        # copied, and from these its columns. To read rows alone, each would have to be a record:
        # at 256 pixels that takes a tenth longer than it saves.
        first = _HEADER.size + begin[0] * width * 3
        rows = tf.strings.substr(record, first, extent[0] * width * 3)
        pixels = tf.reshape(tf.io.decode_raw(rows, tf.uint8), tf.stack([extent[0], width, 3]))
        # `pixels` begins at the window's first row, so only columns are left to be skipped.
        return tf.ensure_shape(tf.slice(pixels, begin * (0, 1, 1), extent), self.shape)


class RawSource(base.Source):
    """What `vit_dist.convert --format=raw` has written, read by index.

    Args:
      split: Name of the subdirectory.
      data_dir: What was given to `vit_dist.convert` as --output, or a copy of it; local.
      check_files: As of `array_record`.

    Raises:
      ConfigError: A folder in a bucket.
      DataError: No complete conversion there, or a file that is missing or was cut.
    """

    name = "raw"
    encoded = False

    def __init__(self, split: str, data_dir: str, check_files: bool = True):
        self.split = split
        # In a bucket TensorFlow would fetch 64 MB for each image.
        folder = paths.local_path(data_dir, "config.data.data_dir of the source 'raw'")
        self._folder = folder / split
        table = read_table(self._folder, " --short_side=N --format=raw")
        self.prepared = preparation_of(table)
        if self.prepared is None or self.prepared.format != "raw":
            raise DataError(
                f"{self._folder} holds encoded images: set config.data.source to array_record"
            )
        self._shards = table["shards"]
        self.class_names = tuple(table["class_names"])
        sizes = read_arrays(
            self._folder / SIZES, remedy="copy the folder again, or remove it and convert again"
        )
        self._sizes = {key: sizes[key] for key in ("height", "width", "label")}
        self.num_examples = len(self._sizes["label"])
        self._file_of, self._at, ends = self._places()
        for shard, end in zip(self._shards, ends, strict=True):
            file = self._folder / shard["name"]
            size = file_size(file) if exists(file) else "no"
            if size != end:
                raise DataError(
                    f"file {file} has {size} bytes instead of {end}: it has been cut or "
                    "replaced; copy it again, or remove it and convert again"
                )
        self.element_spec = {
            "image": tf.TensorSpec((None, None, 3), tf.uint8),
            "label": tf.TensorSpec((), tf.int32),
        }
        self._tables: dict[str, tf.Tensor] | None = None
        base.check_labels(self, lenient=not check_files)

    def __str__(self) -> str:
        return f"raw:{self._folder}"

    def _places(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Returns the file's number and the byte of each record, and where each file ends."""
        counts = [shard["count"] for shard in self._shards]
        if sum(counts) != self.num_examples:
            raise DataError(
                f"{self._folder / SIZES} tells of {self.num_examples} images and {TABLE} of "
                f"{sum(counts)}: copy the folder again, or remove it and convert again"
            )
        height, width = (self._sizes[key].astype(np.int64) for key in ("height", "width"))
        # cumsum counts through all files; each file begins at what it is behind the one before.
        ends = np.cumsum(height * width * 3 + _HEADER.size + _AROUND)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        last = np.cumsum(counts) - 1  # the number of each file's last record
        begins = np.concatenate([[0], ends[last[:-1]]])
        file = np.repeat(np.arange(len(counts)), counts)
        return file, starts - begins[file], (ends[last] - begins).tolist()

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        if self._tables is None:
            names = [os.fsencode(self._folder / shard["name"]) for shard in self._shards]
            self._tables = base.on_host(
                lambda: {
                    "name": tf.constant(names),
                    "file": tf.constant(self._file_of),
                    "at": tf.constant(self._at),
                    "height": tf.constant(self._sizes["height"].astype(np.int64)),
                    "width": tf.constant(self._sizes["width"].astype(np.int64)),
                    "label": tf.constant(self._sizes["label"]),
                }
            )
        table = self._tables
        found = {key: tf.gather(table[key], indices) for key in ("at", "height", "width", "label")}
        return {**found, "file": tf.gather(table["name"], tf.gather(table["file"], indices))}

    def decode_record(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Returns the example, whose image is a Windowed: nothing of it has been read yet."""
        place = {key: record[key] for key in ("file", "at", "height", "width")}
        return {"image": _Stored(place), "label": record["label"]}

    def read(self, index: tf.Tensor) -> dict[str, tf.Tensor]:
        example = super().read(index)
        return {**example, "image": example["image"].whole()}

    def load(self, index: int) -> tuple[np.ndarray, int]:
        return _pixels(load_record(*self._locate(index)))

    def peek(self, index: int) -> tuple[np.ndarray, int]:
        # In Python: TensorFlow would start its runtime, and a device with it.
        return _pixels(read_unverified(*self._locate(index)))

    def _locate(self, index: int) -> tuple[epath.Path, int]:
        return self._folder / self._shards[self._file_of[index]]["name"], int(self._at[index])

    def describe(self, index: int) -> str:
        file, at = self._locate(index)
        return f"the record at byte {at} of {file} (example {index} of {self})"

    def names(self) -> list[str]:
        return [f"{shard['name']} {shard['crc32']}" for shard in self._shards]


def _pixels(record: bytes) -> tuple[np.ndarray, int]:
    """Returns the pixels of a record, (H, W, 3) uint8, and its label."""
    header = header_of(record)
    flat = np.frombuffer(record, np.uint8, offset=_HEADER.size)
    return flat.reshape(header.height, header.width, 3), header.label
