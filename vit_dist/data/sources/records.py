"""Records of tf.train.Example: parsing one, and streaming TFRecord files in a seeded order."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from etils import epath
from google.protobuf.message import DecodeError

from vit_dist import paths
from vit_dist.config.errors import DataError
from vit_dist.data.sources.source import CORRUPT, MISSING

# Streams are shuffled by file and then within blocks of this many records: the two blocks held at a
# time are 0.9 GB of ImageNet's JPEGs (110 kB each).
SHUFFLE_BLOCK = 4096
CYCLE_LENGTH = 16  # files read at a time while shuffling
# Of a file that is read for one record: a buffer would be filled with the records that follow it.
UNBUFFERED = np.int64(0)
ENDED = "Dataset was empty"  # how TensorFlow says that a file ends before a record
# Labels are stored as int64 and given as int32: one that int32 does not hold must not wrap around
# to the number of a class.
LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Keys:
    """Which features of a tf.train.Example hold image and label, and the label of class 0."""

    image: str
    label: str
    first_label: int = 0

    def parse(self, record: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns image (encoded, scalar string) and label (int32) of a serialized example."""
        features = {
            self.image: tf.io.FixedLenFeature((), tf.string),
            self.label: tf.io.FixedLenFeature((), tf.int64),
        }
        parsed = tf.io.parse_single_example(record, features)
        label = tf.clip_by_value(parsed[self.label] - self.first_label, -LARGEST, LARGEST)
        return {"image": parsed[self.image], "label": tf.cast(label, tf.int32)}

    def load(self, record: bytes) -> tuple[bytes, int]:
        """Returns what `parse` does, as bytes and int, without TensorFlow's runtime.

        Raises:
          DataError: A feature is not there, or has several values; names those that are.
        """
        try:
            features = tf.train.Example.FromString(record).features.feature
        except DecodeError as error:
            raise DataError(f"a record is no tf.train.Example: {error}") from error
        image, label = features[self.image].bytes_list.value, features[self.label].int64_list.value
        if len(image) != 1 or len(label) != 1:
            # Looking up features[key] above has added empty features for keys that are missing;
            # these are of no kind.
            kinds = {k: v.WhichOneof("kind") for k, v in features.items()}
            found = sorted(key for key, kind in kinds.items() if kind)
            several = f", {len(image)} and {len(label)} of them" if image and label else ""
            raise DataError(
                f"an example has no bytes {self.image!r} and int64 {self.label!r}, one value each"
                f"{several}; it has {found}"
            )
        return image[0], max(min(label[0] - self.first_label, LARGEST), -LARGEST)


def make_example(image: bytes, label: int, keys: Keys) -> bytes:
    """Returns a serialized tf.train.Example."""
    feature = {
        keys.image: tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        keys.label: tf.train.Feature(
            int64_list=tf.train.Int64List(value=[label + keys.first_label])
        ),
    }
    # Deterministic, because conversions compare records byte by byte.
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(
        deterministic=True
    )


def stream_records(
    files: Sequence[str],
    skips: Sequence[int],
    takes: Sequence[int],
    *,
    seed: tf.Tensor | None,
    epoch: tf.Tensor | int,
    compression: str = "",
) -> tf.data.Dataset:
    """Yields {"index", "record"} of one epoch: `takes` records of each file after `skips`.

    Args:
      files: TFRecord files.
      skips: Per file.
      takes: Per file.
      seed: (2,) int32: the order is a pure function of it and `epoch`; None: the files' order.
      epoch: Its number.
      compression: Of all files: "", "GZIP" or "ZLIB".

    Returns:
      A dataset whose iterator fails with FailedPreconditionError where records are missing: a file
      that was cut between two records ends like a complete one.
    """
    counts = np.array(takes, np.int64)
    columns = {
        "filename": tf.constant([os.fsencode(file) for file in files]),
        "skip": tf.constant(np.array(skips, np.int64)),
        "take": tf.constant(counts),
        # The number of a file's first record: "index" counts through all files in their order.
        "start": tf.constant(np.cumsum(counts) - counts),
    }
    if seed is not None:
        # Two steps: here the files, below the records within blocks. What is in a block comes from
        # CYCLE_LENGTH files in turns.
        seed = tf.random.fold_in(seed, tf.cast(epoch, tf.int32))
        columns = _shuffled(columns, seed)
    cycle = 1 if seed is None else CYCLE_LENGTH
    # From a bucket, the files of a cycle are read at the same time, which does not change the
    # order. A disk needs no such help: the system reads ahead.
    remote = any(map(paths.is_remote, files))
    parallel = {"num_parallel_calls": cycle, "deterministic": True} if remote else {}
    ds = tf.data.Dataset.from_tensor_slices(columns).interleave(
        lambda shard: _read_shard(shard, compression), cycle_length=cycle, **parallel
    )
    if seed is not None:
        # Block by block, each with a seed of its own: a buffer that is refilled would depend on
        # timing.
        ds = ds.batch(SHUFFLE_BLOCK).enumerate()
        ds = ds.map(lambda i, block: _shuffled(block, tf.random.fold_in(seed, i))).prefetch(1)
        ds = ds.unbatch()
    # A file that lost its last records would end the epoch early without a word.
    return ds.apply(tf.data.experimental.assert_cardinality(int(counts.sum())))


def read_record(file: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    """Returns the record of a TFRecord file that begins at byte `offset` (scalar int64).

    Both of its checksums (masked CRC-32C of length and data) are verified.

    Returns:
      A scalar string, in whose place come DataLossError (a flipped bit, or the file ends within
      it), InvalidArgumentError ENDED (the file ends before it) or NotFoundError.
    """
    # The raw op, as tf.data.TFRecordDataset has no argument for where to begin.
    records = tf.raw_ops.TFRecordDatasetV2(
        filenames=file[tf.newaxis],
        compression_type="",
        buffer_size=UNBUFFERED,
        byte_offsets=offset[tf.newaxis],
    )
    records = tf.data.experimental.from_variant(records, tf.TensorSpec((), tf.string))
    # An iterator made and ended for one record: 20 us, next to milliseconds for decoding an image.
    return records.take(1).get_single_element()


def load_record(path: epath.PathLike, offset: int) -> bytes:
    """Returns what `read_record` does, as bytes, for threads.

    Raises:
      DataError: The file is missing, or the record is damaged. What the storage fails to read
        raises another error of TensorFlow's, which says nothing of the record.
    """
    # As bytes, since TensorFlow refuses names that are not UTF-8.
    name = tf.constant(os.fsencode(path))
    with tf.device("CPU:0"):
        try:
            return read_record(name, tf.constant(offset, tf.int64)).numpy()
        except tf.errors.NotFoundError as error:
            raise DataError(f"{MISSING}: {error.message}") from error
        except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
            raise DataError(f"{CORRUPT}: {error.message}") from error


def find_cut(files: Sequence[str], counts: Sequence[int], compression: str = "") -> str | None:
    """Returns which TFRecord file cannot be read or holds another number of records; None if none.

    Args:
      files: All files.
      counts: How many records each should hold.
      compression: Of all files, as in `stream_records`.
    """
    for file, expected in zip(files, counts, strict=True):
        try:
            count = sum(1 for _ in tf.data.TFRecordDataset(os.fsencode(file), compression))
        except tf.errors.OpError as error:
            return f"file {file} cannot be read: {error.message}"
        if count != expected:
            return f"file {file} holds {count} records instead of {expected}: it has been cut"
    return None


def _read_shard(shard: dict[str, tf.Tensor], compression: str) -> tf.data.Dataset:
    records = tf.data.TFRecordDataset(shard["filename"], compression)
    records = records.skip(shard["skip"]).take(shard["take"])
    return records.enumerate(shard["start"]).map(lambda i, x: {"index": i, "record": x})


def _shuffled(columns: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """Reorders the first axis; unlike Dataset.shuffle, it does not depend on tf.random.set_seed."""
    count = tf.shape(next(iter(columns.values())))[0]
    order = tf.random.experimental.stateless_shuffle(tf.range(count), tf.cast(seed, tf.int32))
    return {key: tf.gather(value, order) for key, value in columns.items()}
