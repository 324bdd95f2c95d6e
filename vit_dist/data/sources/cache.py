"""A source whose images are kept in memory or in one file, as they are stored or decoded."""

import functools
import hashlib
import io
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath
from PIL import Image

from vit_dist import paths
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.ops.decoding import decode_whole
from vit_dist.data.sources import source as base
from vit_dist.data.sources.fingerprint import checksum
from vit_dist.storage.errors import retry
from vit_dist.storage.files import file_size, read_arrays, write_whole

FORMS = ("raw", "decoded")
# Raised whenever decoding gives other pixels than before: files of an earlier version are then not
# used any more.
_DECODER = 2
# So many examples tell the mean size of an image within some percent, for which MARGIN is left.
SAMPLE = 256
MARGIN = 1.1
NUM_THREADS = 32
TABLE_BYTES = 64  # for an example, of tables and Python objects


class CachedSource(base.Source):
    """Another source, read once (in `prepare`) and from then on from memory or a local file.

    Every host caches the whole set, as each epoch's permutation gives it other examples. The file
    of a cache is called after the fingerprint of the data and the times of its local files, so that
    data which has changed, such as an image that was mended, gets a new one. It holds a checksum of
    each example.

    Args:
      source: Read by index, with encoded images.
      form: "raw" or "decoded": (H, W, 3) uint8, as `decode` makes them.
      folder: Where the file goes; it is used again by later runs on the same data. None: memory.
      keep_damaged: Keep what is damaged or missing as an empty image, for the pipeline to mask,
        rather than fail. A storage that fails to read it always is an error, and nothing is kept.
      decoding: How the pipe decodes (`decoding.decoding_of`), for the form "decoded": what is kept
        is upright, over its background and as small as the pipe would make it.

    Raises:
      ConfigError: There is nothing to cache, or not enough room: says how much is needed.
    """

    name = "cached"
    portable = False

    def __init__(
        self,
        source,
        form: str,
        *,
        folder: str | None = None,
        keep_damaged: bool = False,
        decoding: dict[str, Any] | None = None,
    ):
        check_cacheable(source, form)
        self._source, self._form, self._keep_damaged = source, form, keep_damaged
        self._decoding = decoding or {}
        self.split, self.num_examples = source.split, source.num_examples
        self.class_names, self.first_label = source.class_names, source.first_label
        self.prepared = source.prepared
        self.encoded = form == "raw"
        self.element_spec = dict(source.element_spec)
        if form == "decoded":
            self.element_spec["image"] = tf.TensorSpec((None, None, 3), tf.uint8)
        # The source's other entries, such as paths, are not kept.
        self.element_spec = {k: self.element_spec[k] for k in ("image", "label")}
        self._path: epath.Path | None = None
        if folder:
            name = f"{_key_of(source, form, self._decoding)}.cache"
            self._path = paths.local_path(folder, "config.input.cache_dir") / name
        self._table: dict[str, np.ndarray] | None = None
        self._data: memoryview | mmap.mmap | None = None
        self._damage: str | None = None  # what was found while reading the file
        # A cache that was filled before needs no further room.
        if self._path is None or not self._table_path.exists():
            self._check_room()

    def __str__(self) -> str:
        return str(self._source)

    @property
    def _table_path(self) -> epath.Path:
        assert self._path is not None
        return self._path.with_suffix(".npz")

    def _check_room(self) -> None:
        need = needed_bytes(self._source, self._form)
        if self._path is None:
            room, where = available_memory(), "in memory"
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            room, where = shutil.disk_usage(self._path.parent).free, f"on the disk of {self._path}"
        logging.info("cache of %s: %.2f GB of %.2f GB %s", self, need / 1e9, room / 1e9, where)
        if need > room:
            raise ConfigError(
                f"config.input.cache={self._form!r} needs about {need / 1e9:.2f} GB for "
                f"{self.num_examples:,} examples, and {room / 1e9:.2f} GB are free {where}: "
                + ("take 'raw', " if self._form == "decoded" else "")
                + "set config.input.cache_dir to a disk with more room, or set cache to 'off'"
                + self._earlier()
            )

    def _earlier(self) -> str:
        """Names the room that caches in the same folder take, for a message."""
        others = list(self._path.parent.glob("*.cache")) if self._path is not None else []
        if not others:
            return ""
        size = sum(file_size(file) for file in others)
        return (
            f"; {len(others)} caches there take {size / 1e9:.2f} GB: remove those of data that has "
            "changed since, or is not used any more"
        )

    def prepare(self) -> None:
        """Fills the cache, unless it is there."""
        if self._table is not None:
            return
        self._source.prepare()
        if self._path is None:
            buffer = io.BytesIO()
            self._table = self._fill(buffer)
            self._data = buffer.getbuffer()
            return
        self._table = self._stored_table() or self._fill_file(self._path)
        # Mapped rather than read: all processes of a host share the pages, and the system drops and
        # reads them again as memory allows.
        with self._path.open("rb") as opened:
            self._data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

    def _stored_table(self) -> dict[str, np.ndarray] | None:
        """Returns the table of a cache that was filled before; None if it is not there whole."""
        assert self._path is not None
        if not self._table_path.exists():
            return None
        try:
            table = read_arrays(self._table_path, remedy="its table cannot be read")
            size, whole = os.path.getsize(self._path), int(table["ends"][-1])
            # The table is written last and holds where the last example ends.
            if size == whole:
                return table
            problem = f"it has {size} bytes instead of {whole}"
        except (DataError, KeyError, FileNotFoundError) as error:
            problem = str(error)
        logging.warning("the cache %s is damaged (%s): filling it again", self._path, problem)
        return None

    def _fill_file(self, path: epath.Path) -> dict[str, np.ndarray]:
        temporary = paths.temporary_name(path)
        try:
            with temporary.open("wb") as file:
                table = self._fill(file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # of a fill that failed
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **table)
        write_whole(self._table_path, buffer.getvalue())  # last: now it counts
        return table

    def _fill(self, file) -> dict[str, np.ndarray]:
        logging.info("filling the cache with %d examples of %s", self.num_examples, self)
        # ends[i] is where example i begins, as example 0 begins at 0.
        ends, labels, shapes, checksums, end = [0], [], [], [], 0
        for data, label, shape in self._read_all():
            file.write(data)
            end += len(data)
            ends.append(end)
            labels.append(label)
            shapes.append(shape)
            checksums.append(zlib.crc32(data))
        if not end:
            raise DataError(f"no example of {self} can be read: there is nothing to cache")
        return {
            "ends": np.array(ends, np.int64),
            "labels": np.array(labels, np.int32),
            "shapes": np.array(shapes, np.int32),
            "checksums": np.array(checksums, np.uint32),
        }

    def _read_all(self) -> Iterator[tuple[bytes, int, tuple[int, int, int]]]:
        with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
            # In the order of their numbers: pool.map keeps it, whichever thread is done first.
            # In parts, as pool.map would otherwise read all of it ahead of what is written.
            for start in range(0, self.num_examples, 4 * NUM_THREADS):
                stop = min(start + 4 * NUM_THREADS, self.num_examples)
                yield from pool.map(self._read_one, range(start, stop))

    def _read_one(self, index: int) -> tuple[bytes, int, tuple[int, int, int]]:
        # For examples that are kept empty, and for the form "raw", which has no shapes.
        label, nothing = 0, (0, 0, 3)
        try:
            image, label = retry(
                f"reading {self.describe(index)}", functools.partial(self._source.load, index)
            )
            if self._form == "raw":
                return bytes(image), label, nothing
            with tf.device("CPU:0"):
                pixels = decode_whole(tf.constant(image), **self._decoding).numpy()
            return pixels.tobytes(), label, pixels.shape
        # Not other OSErrors: a storage that fails for a moment must not be remembered as damage.
        except (FileNotFoundError, ValueError, tf.errors.InvalidArgumentError) as error:
            if self._keep_damaged:
                return b"", label, nothing
            raise DataError(
                f"{self.describe(index)} cannot be read: {error}; replace it or remove it"
            ) from error

    def place(self, positions: tf.Tensor, *, seed: int) -> tuple[tf.Tensor, tf.Tensor]:
        return self._source.place(positions, seed=seed)

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        self.prepare()
        table, data = self._table, self._data
        assert table is not None and data is not None
        # Example i lies at bytes ends[i] to ends[i + 1] of the data.
        ends = table["ends"]

        def piece(i: int) -> bytes:
            # A copy, as TensorFlow's strings own their bytes.
            found = bytes(data[ends[i] : ends[i + 1]])
            # Only a file can be damaged meanwhile; in memory the check is saved.
            if self._path is not None and zlib.crc32(found) != table["checksums"][i]:
                self._damage = (
                    f"the cache {self._path} is damaged at example {i}, not the data itself: "
                    "remove that file, and it is filled again"
                )
                # No DataError, which would mask the example: the data itself is sound.
                raise RuntimeError(self._damage)
            return found

        def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            images = np.array([piece(i) for i in numbers], object)
            return images, table["labels"][numbers], table["shapes"][numbers]

        # A Python function, because no op of TensorFlow reads a part of a file. Hence `portable` is
        # False.
        types = [tf.string, tf.int32, tf.int32]
        image, label, shape = tf.numpy_function(read, [indices], types, stateful=False)
        for tensor, more in ((image, ()), (label, ()), (shape, (3,))):
            tensor.set_shape((*indices.shape, *more))
        return {"image": image, "label": label, "shape": shape}

    def decode_record(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        image = record["image"]
        if self._form == "decoded":
            image = tf.reshape(tf.io.decode_raw(image, tf.uint8), record["shape"])
            image = tf.ensure_shape(image, (None, None, 3))
        return {"image": image, "label": record["label"]}

    def load(self, index: int) -> tuple[bytes | np.ndarray, int]:
        return self._source.load(index)

    def peek(self, index: int) -> tuple[bytes | np.ndarray, int]:
        return self._source.peek(index)

    def names(self):
        return self._source.names()

    def fingerprint(self):
        return self._source.fingerprint()

    def describe(self, index: int) -> str:
        return self._source.describe(index)

    def find_damage(self) -> str | None:
        return self._damage or self._source.find_damage()


def check_cacheable(source: base.Source, form: str) -> None:
    """Raises ConfigError for a source of which a cache is of no use."""
    if not source.indexable or not source.encoded:
        why = "is streamed" if not source.indexable else "has arrays already"
        raise ConfigError(f"config.input.cache={form!r} is of no use: {source} {why}")


def needed_bytes(source: base.Source, form: str) -> int:
    """Returns the bytes that a cache of a source will take, estimated from a sample.

    Args:
      source: Read by index, with encoded images.
      form: "raw" or "decoded".
    """

    def size(index: int) -> int:
        try:
            image, _ = source.peek(index)
            # The label is not needed here, and not checked: the pipeline does that.
            if form == "raw":
                return len(image)
            with Image.open(io.BytesIO(image)) as opened:  # reads the header only
                return opened.width * opened.height * 3
        except (OSError, ValueError):
            return 0  # damaged: it is met again, and named, while the cache is filled

    count = min(SAMPLE, source.num_examples)
    # Evenly spread, as neighbours may be alike in size.
    indices = np.linspace(0, source.num_examples - 1, count).astype(int).tolist()
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        sizes = list(pool.map(size, indices))
    mean = sum(sizes) / count + TABLE_BYTES
    # No margin where every example was looked at.
    return round(mean * source.num_examples * (1 if count == source.num_examples else MARGIN))


def _key_of(source: base.Source, form: str, decoding: dict[str, Any]) -> str:
    """Returns the name of a cache's file, which differs wherever its contents may differ."""
    found = source.fingerprint()
    files = list(source.locations())
    # Without the sizes of the files, other data can have the same fingerprint: then the source's
    # own name and its paths are part of the name too.
    where = [] if "sizes" in found else [str(source), checksum(files)]
    # A fingerprint does not see a file that was mended to the same size, which a resume may go on
    # with; a cache would give its old contents.
    times = checksum(_times_of([file for file in files if not paths.is_remote(file)]))
    # Decoded pixels also depend on our decoder and on how the pipe decodes.
    decoder = [_DECODER, decoding] if form == "decoded" else []
    text = json.dumps([form, where, times, found, *decoder], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _times_of(files: Sequence[str]) -> Iterator[str]:
    """Yields when each local file was changed last, in nanoseconds; "-" for one that is missing."""

    def time_of(file: str) -> str:
        try:
            return str(os.stat(file).st_mtime_ns)
        except FileNotFoundError:
            return "-"

    # 1000 files a task: handing a task to a thread takes longer than asking for one time.
    parts = [files[i : i + 1000] for i in range(0, len(files), 1000)]
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for times in pool.map(lambda part: [time_of(file) for file in part], parts):
            yield from times


def available_memory() -> int:
    """Returns the bytes of memory that this process may take, by the system and its cgroup."""
    if not Path("/proc/meminfo").exists():  # not Linux: what there is, free or not
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = Path("/proc/meminfo").read_text().splitlines()
    # "MemAvailable:   16307584 kB": free memory, and what the system would give back.
    room = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    # A container may have less than the machine: its cgroup (version 2) says how much.
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        room = min(room, int(limit.read_text()) - int(used.read_text()))
    return room
