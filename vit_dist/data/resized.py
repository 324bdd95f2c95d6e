"""Sets resized beforehand: a source's images with a short side of N, as JPEGs or as raw pixels.

    --format=jpeg   shards that the source "array_record" reads: array_record.py says how they lie
    --format=raw    files of pixels that the source "raw" reads: raw.py says how they lie

Beside them `verified.json` lists the shards that have been read back, until shards.json is written
with that list. So a conversion that was killed goes on with the first shard that is not in it.
"""

import collections
import functools
import io
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from etils import epath
from PIL import Image

from vit_dist import paths
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.damage import MAX_NAMED, MAX_SECONDS, message_of
from vit_dist.data.ops import orientation
from vit_dist.data.ops.basic import resize_small
from vit_dist.data.ops.decoding import decode_whole
from vit_dist.data.resized_files import JpegShards, RawShards, check
from vit_dist.data.sources import array_record, labels, raw
from vit_dist.data.sources.preparation import TABLE, Preparation, read_table
from vit_dist.data.sources.records import make_example
from vit_dist.data.sources.shard_reader import MAX_PARALLEL
from vit_dist.data.sources.source import Source
from vit_dist.storage.files import file_size, read_json, write_whole

# What transparent images are laid over, as in configs/folder.py: white.
BACKGROUND = (255, 255, 255)
# What may have been done to an image; an image of which none was done is kept as it is.
REDUCED, TURNED, LAID = "reduced", "turned upright", "laid over white"
VERIFIED = "verified.json"
_PART = 4 * MAX_PARALLEL  # images in memory at a time
# What reading or decoding a damaged image raises; a storage that fails raises other errors.
_DAMAGE = (FileNotFoundError, ValueError, tf.errors.InvalidArgumentError, tf.errors.DataLossError)


class Resized(NamedTuple):
    """An image that was prepared: its pixels, and what that changed."""

    pixels: np.ndarray  # (H, W, 3) uint8
    changes: tuple[str, ...]


def resize(image: bytes | np.ndarray, short_side: int) -> Resized:
    """Returns an image upright, over white, and with a short side of at most `short_side`.

    It is decoded and reduced by the ops that pipes have, `decode(exif=True, background=255)` and
    `resize_small(short_side)`, so the pixels are those that a pipe with these ops makes.

    Args:
      image: The bytes of an image file, or (H, W, C) uint8 of 1 to 4 channels.
      short_side: In pixels.

    Raises:
      InvalidArgumentError, DataError: The image is damaged, or of a kind that is not read.
    """
    changes: list[str] = []
    with tf.device("CPU:0"):
        if isinstance(image, np.ndarray) and image.shape[-1] in (1, 3):
            # One channel is repeated, three stay as they are; nothing is copied.
            pixels = np.broadcast_to(image, (*image.shape[:2], 3))
        else:
            # An array with alpha takes the way of a PNG that holds it.
            data = image if isinstance(image, bytes) else array_record.png(image)
            pixels, changes = _decode(tf.constant(data))
        # Never enlarged: pixels that are made up would cost storage and reading time for nothing.
        if min(pixels.shape[:2]) > short_side:
            reduced = resize_small(short_side)({"image": tf.constant(pixels), "seed": None})
            pixels = reduced["image"].numpy()
            changes = [REDUCED, *changes]
    return Resized(pixels, tuple(changes))


def _decode(data: tf.Tensor) -> tuple[np.ndarray, list[str]]:
    """Returns the pixels of a file's bytes, () string, and what differs from plain decoding."""
    pixels = decode_whole(data, exif=True, background=BACKGROUND).numpy()
    is_jpeg = bool(tf.io.is_jpeg(data))
    way = orientation.of_jpeg(data) if is_jpeg else orientation.of_other(data)
    changes = [TURNED] if int(way) > 1 else []
    # An alpha that is 255 everywhere changes nothing, so the pixels tell, and not the header.
    if not is_jpeg and not np.array_equal(decode_whole(data, exif=True).numpy(), pixels):
        changes.append(LAID)
    return pixels, changes


def _record(image: bytes | np.ndarray, label: int, preparation: Preparation) -> tuple[bytes, tuple]:
    """Returns the serialized example of an image that is prepared, and what that changed."""
    pixels, changes = resize(image, preparation.short_side)
    if preparation.format == "raw":
        return raw.make_record(pixels, label), changes
    if changes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=preparation.quality)
        data = buffer.getvalue()
    else:
        # Encoded once more, it would only lose.
        data = image if isinstance(image, bytes) else array_record.png(image)
    return make_example(data, label, array_record.KEYS), changes


def convert_resized(
    source: Source,
    folder: epath.PathLike,
    preparation: Preparation,
    *,
    split: str,
    examples_per_shard: int,
    report: Callable[[int], None] = lambda count: None,
) -> int:
    """Writes a source's images resized into `folder`/<split>; goes on where a call was stopped.

    Every shard is read back, and its number of examples and the CRC-32 of its records are compared
    with those of what was written. Those of an earlier call are read back again.

    Args:
      source: Read by index, or streamed in the order of its files.
      folder: Local.
      preparation: How.
      split: Name of the directory in it, and of the split that is then read.
      examples_per_shard: After so many a call that is stopped goes on; the last may have fewer.
      report: Called with the number of examples that are done, now and then.

    Returns:
      The number of shards written by this call.

    Raises:
      DataError: The folder holds other data, a shard does not read back, or examples are damaged
        or have a label outside of the classes; names them.
    """
    if examples_per_shard < 1:
        raise ConfigError(f"examples_per_shard must be 1 or more, got {examples_per_shard}")
    out = paths.local_path(folder, "the folder for shards") / split
    out.mkdir(parents=True, exist_ok=True)
    array_record.check_plan(out / array_record.PLAN, _plan(source, preparation, examples_per_shard))
    # Rounded up, for // rounds down.
    num_shards = -(-source.num_examples // examples_per_shard)
    store = (RawShards if preparation.format == "raw" else JpegShards)(out, num_shards)
    verified, written = _verified(out), 0
    with futures.ThreadPoolExecutor(MAX_PARALLEL) as pool:
        maker = _Maker(source, preparation, pool, report)
        for i in range(num_shards):
            # A slice of a range is a range: the numbers of shard i, fewer in the last one.
            numbers = range(source.num_examples)[i * examples_per_shard :][:examples_per_shard]
            path = store.path(i)
            if i >= len(verified) or not path.exists():
                tally = _Tally()
                store.write(path, tally.over(maker.take(numbers)))
                entry = {"name": path.name, "size": file_size(path), **tally.found()}
                # Replaces entry i, or appends it where the list ends before.
                verified[i : i + 1] = [entry]
                written += 1
            check(path, verified[i], store.read(path))
            write_whole(out / VERIFIED, json.dumps({"shards": verified}).encode())
            report(numbers.stop)
    store.finish()
    _write_table(out, source, preparation, verified)
    return written


def changes_of(folder: epath.PathLike, split: str) -> str:
    """Returns what a conversion that has ended changed, in words."""
    table = read_table(paths.expand(folder) / split)
    total = sum(shard["count"] for shard in table["shards"])
    counts = [f"{table['changes'].get(name, 0):,} {name}" for name in (REDUCED, TURNED, LAID)]
    size = sum(shard["size"] for shard in table["shards"])
    return (
        f"{Preparation(**table['prepared'])}: of {total:,} images {', '.join(counts)}; the others "
        f"keep their pixels; {size / 1e6:,.1f} MB"
    )


def _plan(source: Source, preparation: Preparation, examples_per_shard: int) -> dict[str, Any]:
    """Returns what a later call must have in common with this one to go on."""
    # What was written is not made again from the source to compare it, so that contents which have
    # changed under the same names must show here: by the sizes, and by the examples looked at.
    found = source.fingerprint()
    contents = {key: found[key] for key in ("sample", "sizes") if key in found}
    plan = array_record.plan_of(source) | contents | preparation.as_dict()
    return plan | {"examples_per_shard": examples_per_shard}


def _verified(out: epath.Path) -> list[dict[str, Any]]:
    """Returns the entries of the shards that earlier calls have read back."""
    for path in (out / VERIFIED, out / TABLE):
        if path.exists():
            return read_json(path, remedy=f"remove {out}, and convert again")["shards"]
    return []


def _write_table(
    out: epath.Path, source: Source, preparation: Preparation, shards: list[dict[str, Any]]
) -> None:
    changes: collections.Counter[str] = collections.Counter()
    for shard in shards:
        changes.update(shard["changes"])
    table = {
        "class_names": list(source.class_names),
        "source": str(source),
        "prepared": preparation.as_dict(),
        "changes": dict(changes),
        "shards": shards,
    }
    for left in out.glob("*.tmp"):  # by calls that were killed
        left.unlink()
    # Last: a folder without it is no source. It takes the place of the list of what is verified.
    write_whole(out / TABLE, json.dumps(table, indent=1).encode())
    (out / VERIFIED).unlink(missing_ok=True)


class _Made(NamedTuple):
    """An example that was made: its record, and what was changed; or what is wrong with it."""

    record: bytes
    changes: tuple[str, ...] = ()
    problem: str = ""


class _Maker:
    """Makes the records of a source's examples, several at a time."""

    def __init__(
        self,
        source: Source,
        preparation: Preparation,
        pool: futures.Executor,
        report: Callable[[int], None],
    ):
        self._source, self._preparation, self._pool = source, preparation, pool
        self._report = report
        self._stream: Iterator[tuple[bytes, int]] = iter(())
        self._next = -1  # the number of the next example of the stream

    def take(self, numbers: range) -> Iterator[_Made]:
        """Yields the examples of these numbers.

        Raises:
          DataError: Some are damaged; names these, and others of the examples that follow.
        """
        for part in self._parts(numbers):
            if any(made.problem for made in part):
                rest = self._parts(range(self._next, self._source.num_examples))
                raise DataError(_problems(itertools.chain([part], rest)))
            yield from part
            self._report(self._next)

    def _parts(self, numbers: range) -> Iterator[list[_Made]]:
        for start in range(numbers.start, numbers.stop, _PART):
            part = range(start, min(start + _PART, numbers.stop))
            yield list(self._pool.map(self._make, part, self._loads(part)))

    def _loads(self, part: range) -> list[Callable[[], tuple]]:
        """Returns for each example a function that gives its image and its label."""
        if self._source.indexable:
            self._next = part.stop
            # Called by the pool's threads, because a source in a bucket waits for each image.
            return [functools.partial(self._source.load, number) for number in part]
        # The stream is opened anew behind shards that were there already.
        if self._next != part.start:
            self._stream = array_record.streamed(self._source, part.start)
        self._next = part.stop
        examples = [next(self._stream) for _ in part]
        # These are loaded already, but _make wants a function to call, as for the source above.
        return [functools.partial(tuple, example) for example in examples]

    def _make(self, number: int, load: Callable[[], tuple]) -> _Made:
        source = self._source
        try:
            image, label = load()
            problem = labels.problem(label, source.num_classes)
            if problem:
                advice = labels.advise(label, source.num_classes, first_label=source.first_label)
                return _Made(b"", problem=f"{source.describe(number)}: {problem}. {advice}")
            return _Made(*_record(image, label, self._preparation))
        except _DAMAGE as error:
            text = f"{source.describe(number)} cannot be read: {message_of(error)}"
            return _Made(b"", problem=text)


def _problems(parts: Iterable[list[_Made]]) -> str:
    """Returns one message of all that is wrong in `parts`, until a limit of number or time."""
    lines: list[str] = []
    deadline = time.monotonic() + MAX_SECONDS
    try:
        for part in parts:
            lines += [made.problem for made in part if made.problem]
            if len(lines) >= MAX_NAMED or time.monotonic() > deadline:
                break
    except DataError as error:
        lines.append(str(error))  # a stream ends where its file is damaged
    if len(lines) == 1:
        return f"{lines[0]}; replace it or remove it"
    shown = "".join(f"\n  {line}" for line in lines[:MAX_NAMED])
    return f"{len(lines)} examples are damaged; replace it or remove it, each of these:{shown}"


class _Tally:
    """Counts and sums up the records that pass through."""

    def __init__(self) -> None:
        self._count = self._crc = 0
        self._changes: collections.Counter[str] = collections.Counter()

    def over(self, examples: Iterable[_Made]) -> Iterator[bytes]:
        """Passes the examples' records on."""
        for made in examples:
            self._count += 1
            self._crc = zlib.crc32(made.record, self._crc)
            self._changes.update(made.changes)
            yield made.record

    def found(self) -> dict[str, Any]:
        return {"count": self._count, "crc32": self._crc, "changes": dict(self._changes)}
