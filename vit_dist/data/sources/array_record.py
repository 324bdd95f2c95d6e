"""Indexed shards in ArrayRecord's format: writing them from any source, and reading them back.

    <folder>/<split>/00003-of-00008.array_record     tf.train.Example, feature by Keys
    <folder>/<split>/shards.json                      classes, and count and CRC-32 of each shard

shards.json is written last. A shard counts when it has its own name, as it is written under another
and renamed; so a conversion that was interrupted goes on with the first shard that is missing.
"""

import functools
import json
import zlib
from collections.abc import Callable
from concurrent import futures
from typing import Any

import numpy as np
import tensorflow as tf
from array_record.python import array_record_data_source, array_record_module
from etils import epath
from PIL import Image

from vit_dist import paths
from vit_dist.data.sources import source as base
from vit_dist.data.sources.records import Keys, make_example
from vit_dist.data.sources.synthetic import encode

KEYS = Keys("image", "label")
TABLE, PLAN = "shards.json", "plan.json"
OPTIONS = "group_size:1"  # each record can be read alone; images do not compress any further
MAX_PARALLEL = 32  # reads at a time, which wait rather than compute


class ArrayRecordSource(base.Source):
    """Shards that `convert` has written, read by index.

    Args:
      split: Name of the subdirectory.
      data_dir: What was given to `vit_dist.convert` as --output, or a copy of it at gs://, which
        array_record reads by itself.

    Raises:
      ValueError: No complete conversion there, or a shard that is missing or damaged.
    """

    name = "array_record"
    portable = False

    def __init__(self, split: str, data_dir: str):
        self.split = split
        self._folder = epath.Path(data_dir).expanduser() / split
        path = self._folder / TABLE
        if not path.exists():
            raise ValueError(
                f"{path} does not exist: name the folder and the split of a conversion that ended "
                "(python -m vit_dist.convert)"
            )
        table = json.loads(path.read_text())
        self._shards = table["shards"]
        self.class_names = tuple(table["class_names"])
        self.num_examples = sum(shard["count"] for shard in self._shards)
        self.element_spec = {
            "image": tf.TensorSpec((), tf.string),
            "label": tf.TensorSpec((), tf.int32),
        }
        for shard in self._shards:
            file = self._folder / shard["name"]
            size = file.stat().length if file.exists() else "no"
            if size != shard["size"]:
                raise ValueError(
                    f"file {file} has {size} bytes instead of {shard['size']}: it has been cut or "
                    "replaced; copy it again, or remove it and convert again"
                )

    def __str__(self) -> str:
        return f"array_record:{self._folder}"

    @functools.cached_property
    def _reader(self):
        files = [str(self._folder / shard["name"]) for shard in self._shards]
        return array_record_data_source.ArrayRecordDataSource(files)

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"record": base.read_records(lambda i: self._reader.__getitems__(i), indices)}

    def decode_record(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return KEYS.parse(record["record"])

    def load(self, index: int) -> tuple[bytes, int]:
        return KEYS.load(self._reader.__getitems__([index])[0])

    def names(self) -> list[str]:
        return [f"{shard['name']} {shard['crc32']}" for shard in self._shards]


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
      source: Read by index.
      folder: Local.
      split: Name of the directory in it, and of the split that is then read.
      examples_per_shard: The last shard may have fewer.
      report: Called with the number of examples that are done, now and then.

    Returns:
      The number of shards written by this call.

    Raises:
      ValueError: The folder holds the shards of other data, or a shard does not read back.
    """
    if examples_per_shard < 1:
        raise ValueError(f"examples_per_shard must be 1 or more, got {examples_per_shard}")
    out = paths.local_path(folder, "the folder for shards") / split
    out.mkdir(parents=True, exist_ok=True)
    plan = {**source.fingerprint(), "examples_per_shard": examples_per_shard}
    _check_plan(out / PLAN, plan)
    num_shards = -(-source.num_examples // examples_per_shard)
    shards: list[dict[str, Any]] = []
    written = 0
    with futures.ThreadPoolExecutor(MAX_PARALLEL) as pool:
        for i in range(num_shards):
            path = out / f"{i:05d}-of-{num_shards:05d}.array_record"
            numbers = range(source.num_examples)[i * examples_per_shard :][:examples_per_shard]
            if not path.exists():
                _write_shard(path, source, numbers, pool)
                written += 1
            shards.append(_describe_shard(path, source, numbers, pool))
            report(numbers.stop)
    table = {"class_names": list(source.class_names), "source": str(source), "shards": shards}
    for left in out.glob("*.tmp"):  # by calls that were killed
        left.unlink()
    paths.write_whole(out / TABLE, json.dumps(table, indent=1).encode())
    return written


def _check_plan(path: epath.Path, plan: dict[str, Any]) -> None:
    if not path.exists():
        paths.write_whole(path, json.dumps(plan).encode())
    elif json.loads(path.read_text()) != plan:
        raise ValueError(
            f"{path.parent} holds shards of other data or of another size ({path.read_text()} "
            f"instead of {json.dumps(plan)}): give another folder, or remove this one"
        )


def _records(source: base.Source, numbers: range, pool: futures.Executor):
    """Yields the serialized examples; a few are read ahead."""

    def record(number: int) -> bytes:
        image, label = source.load(number)
        if isinstance(image, np.ndarray):
            image = encode(Image.fromarray(image), "PNG")
        return make_example(image, label, KEYS)

    for start in range(numbers.start, numbers.stop, 4 * MAX_PARALLEL):
        yield from pool.map(record, numbers[start - numbers.start :][: 4 * MAX_PARALLEL])


def _write_shard(path: epath.Path, source: base.Source, numbers: range, pool) -> None:
    temporary = paths.temporary_name(path)
    writer = array_record_module.ArrayRecordWriter(str(temporary), OPTIONS)
    try:
        for record in _records(source, numbers, pool):
            writer.write(record)
    finally:
        writer.close()
    temporary.replace(path)


def _describe_shard(path: epath.Path, source: base.Source, numbers: range, pool) -> dict[str, Any]:
    """Reads a shard back; returns what the table says of it."""
    crc, found = 0, -1
    try:
        reader = array_record_data_source.ArrayRecordDataSource([str(path)])
        found = len(reader)
        if found == len(numbers):
            for i, record in enumerate(_records(source, numbers, pool)):
                if reader[i] != record:
                    raise ValueError(f"{path} differs from {source.describe(numbers[i])}")
                crc = zlib.crc32(record, crc)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{error or path}: remove {path} and convert again") from error
    if found != len(numbers):
        raise ValueError(
            f"{path} holds {found} records instead of {len(numbers)}: remove it and convert again"
        )
    return {"name": path.name, "count": found, "size": path.stat().length, "crc32": crc}
