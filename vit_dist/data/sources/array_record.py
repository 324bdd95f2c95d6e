"""Indexed shards in ArrayRecord's format: writing them from any source, and reading them back.

    <folder>/<split>/00003-of-00008.array_record     tf.train.Example, feature by Keys
    <folder>/<split>/shards.json                      classes, and count and CRC-32 of each shard

shards.json is written last. A shard is written under a temporary name and renamed when it is whole;
so a conversion that was interrupted goes on with the first shard that is missing.
"""

import contextlib
import functools
import json
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
import tensorflow as tf
from array_record.python import array_record_module
from etils import epath
from PIL import Image

from vit_dist import paths
from vit_dist.config.errors import ConfigError, DataError, StorageError
from vit_dist.data.sources import labels
from vit_dist.data.sources import source as base
from vit_dist.data.sources.preparation import TABLE, preparation_of, read_table
from vit_dist.data.sources.records import Keys, make_example
from vit_dist.data.sources.shard_reader import MAX_PARALLEL, OpenShard, Shard, ShardReader
from vit_dist.data.sources.synthetic import encode
from vit_dist.storage.errors import cause, only_warn
from vit_dist.storage.files import exists, file_size, read_json, write_whole

KEYS = Keys("image", "label")
PLAN = "plan.json"
# What a stream raises where its files are damaged, cut or gone; storage that fails, other errors.
_DAMAGED_STREAM = (
    tf.errors.DataLossError,
    tf.errors.FailedPreconditionError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
)
OPTIONS = "group_size:1"  # each record can be read alone; images do not compress any further


class ArrayRecordSource(base.Source):
    """Shards that `convert` has written, read by index.

    Args:
      split: Name of the subdirectory.
      data_dir: What was given to `vit_dist.convert` as --output, or a copy of it at gs://, which
        array_record reads by itself.
      check_files: Whether one label outside of the classes, among a few examples that are looked
        at, is an error at opening. If most are, it always is.

    Raises:
      DataError: No complete conversion there, or a shard that is missing or damaged.
    """

    name = "array_record"
    portable = False

    def __init__(self, split: str, data_dir: str, check_files: bool = True):
        self.split = split
        self._folder = paths.expand(data_dir) / split
        table = read_table(self._folder)
        self.prepared = preparation_of(table)
        if self.prepared is not None and self.prepared.format == "raw":
            raise DataError(f"{self._folder} holds raw pixels: set config.data.source to raw")
        self._shards = table["shards"]
        self.class_names = tuple(table["class_names"])
        self.num_examples = sum(shard["count"] for shard in self._shards)
        self.element_spec = {
            "image": tf.TensorSpec((), tf.string),
            "label": tf.TensorSpec((), tf.int32),
        }
        # The sizes tell a shard that was cut or replaced, without reading it.
        for shard in self._shards:
            file = self._folder / shard["name"]
            size = file_size(file) if exists(file) else "no"
            if size != shard["size"]:
                raise DataError(
                    f"file {file} has {size} bytes instead of {shard['size']}: it has been cut or "
                    "replaced; copy it again, or remove it and convert again"
                )
        base.check_labels(self, lenient=not check_files)

    def __str__(self) -> str:
        return f"array_record:{self._folder}"

    @functools.cached_property
    def _reader(self) -> ShardReader:
        return ShardReader(
            [Shard(str(self._folder / shard["name"]), 0, shard["count"]) for shard in self._shards]
        )

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"record": base.read_records(self._reader.read, indices)}

    def decode_record(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return KEYS.parse(record["record"])

    def load(self, index: int) -> tuple[bytes, int]:
        return KEYS.load(self._reader.read([index])[0])

    def names(self) -> list[str]:
        return [f"{shard['name']} {shard['crc32']}" for shard in self._shards]

    def locations(self) -> list[str]:
        return [str(self._folder / shard["name"]) for shard in self._shards]


def convert(
    source: base.Source,
    folder: epath.PathLike,
    *,
    split: str,
    examples_per_shard: int,
    report: Callable[[int], None] = lambda count: None,
) -> int:
    """Writes a source as shards into `folder`/<split>; goes on where an earlier call was stopped.

    Every shard is read again and compared with what went into it. Images that are arrays become
    PNGs; encoded ones stay as they are, byte for byte.

    Args:
      source: Read by index, or streamed in the order of its files.
      folder: Local.
      split: Name of the directory in it, and of the split that is then read.
      examples_per_shard: The last shard may have fewer.
      report: Called with the number of examples that are done, now and then.

    Returns:
      The number of shards written by this call.

    Raises:
      DataError: The folder holds the shards of other data, a shard does not read back, or an
        example has a label outside of the classes.
    """
    if examples_per_shard < 1:
        raise ConfigError(f"examples_per_shard must be 1 or more, got {examples_per_shard}")
    out = paths.local_path(folder, "the folder for shards") / split
    out.mkdir(parents=True, exist_ok=True)
    # Shards are numbered by it, so another number of examples per shard is another plan.
    plan = {**plan_of(source), "examples_per_shard": examples_per_shard}
    check_plan(out / PLAN, plan)
    num_shards = -(-source.num_examples // examples_per_shard)
    shards: list[dict[str, Any]] = []
    written = 0
    with futures.ThreadPoolExecutor(MAX_PARALLEL) as pool:
        # A shard that is there was whole when it was renamed, and is compared with the source even
        # so. Writing and comparing read the source side by side, each in order: so a stream is read
        # twice in all, and not from its beginning for every shard.
        to_write, to_compare = _Records(source, pool), _Records(source, pool)
        for i in range(num_shards):
            path = out / shard_name(i, num_shards)
            # Slicing a range cuts the last shard off at the number of examples.
            numbers = range(source.num_examples)[i * examples_per_shard :][:examples_per_shard]
            if not path.exists():
                write_shard(path, to_write.take(numbers))
                written += 1
            shards.append(_describe_shard(path, source, numbers, to_compare.take(numbers)))
            report(numbers.stop)
    # The table is written last: a folder without it is no source, and a later call goes on there.
    table = {"class_names": list(source.class_names), "source": str(source), "shards": shards}
    for left in out.glob("*.tmp"):  # by calls that were killed
        left.unlink()
    write_whole(out / TABLE, json.dumps(table, indent=1).encode())
    return written


def shard_name(number: int, count: int) -> str:
    """Returns the name of a shard's file, e.g. 00003-of-00008.array_record."""
    return f"{number:05d}-of-{count:05d}.array_record"


def plan_of(source: base.Source) -> dict[str, Any]:
    """Returns which examples a conversion is of; their contents are compared shard by shard."""
    kept = ("num_examples", "classes", "names", "parts")
    return {key: value for key, value in source.fingerprint().items() if key in kept}


def check_plan(path: epath.Path, plan: dict[str, Any]) -> None:
    """Writes the plan of a conversion, or compares it with that of an earlier call.

    Raises:
      DataError: With another plan this call would mix shards of two conversions.
    """
    if not path.exists():
        write_whole(path, json.dumps(plan).encode())
        return
    found = read_json(path, remedy=f"remove {path.parent}, and convert again")
    if found != plan:
        raise DataError(
            f"{path.parent} holds shards of other data or of another size ({json.dumps(found)} "
            f"instead of {json.dumps(plan)}): give another folder, or remove this one"
        )


class _Records:
    """The serialized examples of a source, in its order."""

    def __init__(self, source: base.Source, pool: futures.Executor):
        self._source, self._pool = source, pool
        self._stream: Iterator[tuple[bytes, int]] = iter(())
        self._next = -1  # the number of the next example of the stream

    def take(self, numbers: range) -> Iterator[bytes]:
        """Yields the examples of successive numbers, serialized; a few are read ahead.

        Raises:
          DataError: An example is damaged, or has a label outside of the classes; names it.
        """
        if self._source.indexable:
            for start in range(numbers.start, numbers.stop, 4 * MAX_PARALLEL):
                part = numbers[start - numbers.start :][: 4 * MAX_PARALLEL]
                # In parallel, because a source in a bucket waits for each image; in parts, so that
                # only a few images are in memory.
                loaded = self._pool.map(self._load, part)
                for number, (image, label) in zip(part, loaded, strict=True):
                    yield self._record(number, image, label)
            return
        # Shards that were there already have been passed over: the stream is opened anew at the
        # number wanted.
        if self._next != numbers.start:
            self._stream, self._next = streamed(self._source, numbers.start), numbers.start
        for number in numbers:
            image, label = next(self._stream)
            self._next += 1
            yield self._record(number, image, label)

    def _load(self, number: int) -> tuple[bytes | np.ndarray, int]:
        try:
            return self._source.load(number)
        except (FileNotFoundError, ValueError) as error:
            raise DataError(
                f"{self._source.describe(number)} cannot be read: {error}; replace it or remove it"
            ) from error

    def _record(self, number: int, image: bytes | np.ndarray, label: int) -> bytes:
        # Every example is read here anyway, so a bad label is named now and not in the first epoch.
        problem = labels.problem(label, self._source.num_classes)
        if problem:
            advice = labels.advise(
                label, self._source.num_classes, first_label=self._source.first_label
            )
            raise DataError(f"{self._source.describe(number)}: {problem}. {advice}")
        return make_example(image if isinstance(image, bytes) else png(image), label, KEYS)


def streamed(source: base.Source, first: int) -> Iterator[tuple[bytes, int]]:
    """Yields image and label of the examples of a stream from number `first` on.

    Raises:
      DataError: A file, or an example, is damaged; names it.
    """
    with tf.device("CPU:0"):
        # Skipped before decode_record, so that what is passed over costs reading alone.
        ds = source.stream(seed=None, epoch=0).skip(first).map(source.decode_record).prefetch(1)
        examples = ds.as_numpy_iterator()
    number = first
    try:
        for example in examples:
            yield example["image"], int(example["label"])
            number += 1
    except _DAMAGED_STREAM as error:
        example = f"{source.describe(number)} cannot be read: {cause(error)}"
        raise DataError(source.find_damage() or f"{example}; replace it or remove it") from error


def png(image: np.ndarray) -> bytes:
    """Returns the PNG of an array (H, W, C), which holds every value."""
    if image.shape[-1] not in (1, 2, 3, 4):
        raise DataError(
            f"images of {image.shape[-1]} channels cannot be stored as PNG, which holds 1 to 4"
        )
    # Pillow takes grey images without an axis for the channel.
    return encode(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), "PNG")


def write_shard(path: epath.Path, records: Iterator[bytes]) -> None:
    """Writes records as a shard, which has its name when it is whole."""
    temporary = paths.temporary_name(path)
    # Under another name until it is whole; a call that is killed leaves only the temporary file.
    writer = array_record_module.ArrayRecordWriter(str(temporary), OPTIONS)
    try:
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
    # The library tells a full disk as "write() failed: File too large; writing PATH".
    except RuntimeError as error:
        if "writing " not in str(error):
            raise
        with only_warn(f"removing {temporary}"):
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"could not write {path}: {str(error).partition(';')[0]}. Make room on that disk "
            "(df -h), or use another one, and run again: the shards that are whole stay"
        ) from error
    temporary.replace(path)


def _describe_shard(
    path: epath.Path, source: base.Source, numbers: range, records: Iterator[bytes]
) -> dict[str, Any]:
    """Reads a shard back and compares it with `records`; returns what the table says of it."""
    crc = 0
    with contextlib.ExitStack() as stack:
        with _of_shard(path):
            # Not through ShardReader, which keeps files open: each shard is read once.
            shard = stack.enter_context(OpenShard(str(path)))
            found = len(shard)
        # A shard of another length is not compared record by record; the error below names it.
        for i, record in enumerate(records if found == len(numbers) else ()):
            with _of_shard(path):
                if shard.read([i])[0] != record:
                    raise DataError(f"{path} differs from {source.describe(numbers[i])}")
            # Over all records as read back. `names` puts it into the fingerprint, where it
            # tells shards of equal names apart.
            crc = zlib.crc32(record, crc)
    if found != len(numbers):
        raise DataError(
            f"{path} holds {found} records instead of {len(numbers)}: remove it and convert again"
        )
    return {"name": path.name, "count": found, "size": file_size(path), "crc32": crc}


@contextlib.contextmanager
def _of_shard(path: epath.Path) -> Iterator[None]:
    """Adds the remedy for a shard to what is raised within it.

    Not around what reads the source: where that is damaged, the shard may be the only good copy.
    """
    try:
        yield
    except ValueError as error:
        raise DataError(f"{error or path}: remove {path} and convert again") from error
