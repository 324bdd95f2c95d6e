"""A source of TFRecord files of tf.train.Example, read by index or streamed."""

import os
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath

from vit_dist import paths
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.sources import source as base
from vit_dist.data.sources.fingerprint import checksum, sampled
from vit_dist.data.sources.record_table import SUFFIX, open_table, read_unverified
from vit_dist.data.sources.records import Keys, find_cut, load_record, read_record, stream_records

READ_AHEAD_VARIABLE = "GCS_READAHEAD_BUFFER_SIZE_BYTES"  # TensorFlow's, for gs://


class TfrecordSource(base.Source):
    """TFRecord files of examples with an encoded image and an int64 label.

    At the first opening the headers of all records are scanned for where each record begins. The
    table of these places is kept beside the files, so that later openings are fast, and a file that
    has changed since (for instance, was cut between two records) is noticed. Where the folder is
    not writable, each opening scans. By index, each example costs one seek; streamed, files are
    read in one go, at the price that `base.log_streaming` tells. Both ways verify the checksums of
    the records. Files that are compressed as a whole (GZIP or ZLIB) have no places to seek to, and
    are streamed.

    Args:
      split: Replaces {split} in `files`.
      files: Pattern of the files, e.g. "gs://bucket/imagenet/{split}-*-of-*"; wildcards in its last
        part only. A file that is called as the pattern is written is taken alone.
      num_classes: Number of classes, or None for as many as `class_file` has lines.
      class_file: Text file with the name of a class per line; by default they are "0", "1", ...
      image_key: Feature with the encoded image.
      label_key: Feature with the class number.
      first_label: The number of the first class; 1 in ImageNet as TF Model Garden stores it.
      counts: Split -> how many examples its files should hold. Nothing else tells that a file was
        cut between two records before it was first opened here.
      stream: Read the files in sequence rather than by index; None: only compressed ones, and those
        in a bucket, where TensorFlow fetches 64 MB for every record that is read by index.
      check_files: Whether one label outside of the classes, among a few examples that are looked
        at, is an error at opening. If most are, it always is.

    Raises:
      DataError: No file, no class, a file that ends within a record or has changed, or an example
        without these features.
    """

    name = "tfrecord"

    def __init__(
        self,
        split: str,
        files: str,
        num_classes: int | None = None,
        class_file: str | None = None,
        image_key: str = "image/encoded",
        label_key: str = "image/class/label",
        first_label: int = 0,
        counts: Mapping[str, int] | None = None,
        stream: bool | None = None,
        check_files: bool = True,
    ):
        self.split, self.first_label = split, first_label
        self._pattern = files.replace("{split}", split)
        self._remote = paths.is_remote(files)
        # Sorted by name: the number of an example counts through the files in that order.
        self.files = _matching(self._pattern)
        self.class_names = _class_names(num_classes, class_file)
        self._keys = Keys(image_key, label_key, first_label)
        expected = _count_of(split, counts)
        self._table = open_table(
            self.files,
            epath.Path(self._pattern).name,
            lambda count: _check_count(count, expected, self._pattern),
        )
        self.indexable = self._choose_order(stream)
        # For each file the number of its first example, and in the end the number of all examples.
        self._starts = np.cumsum([0, *(len(offsets) for offsets in self._table.offsets)])
        self.num_examples = int(self._starts[-1])
        self._tables: dict[str, tf.Tensor] | None = None
        self.element_spec = {
            "image": tf.TensorSpec((), tf.string),
            "label": tf.TensorSpec((), tf.int32),
        }
        if not self.num_examples:
            raise DataError(f"the files {self._pattern} hold no record")
        # This reads a few examples, and so also finds features that are called otherwise.
        base.check_labels(self, lenient=not check_files)

    def __str__(self) -> str:
        return f"tfrecord:{self._pattern}"

    def _choose_order(self, stream: bool | None) -> bool:
        """Returns whether to read by index."""
        compressed = self._table.compression
        if compressed and stream is False:
            raise ConfigError(
                f"the files {self._pattern} are compressed ({compressed}), so that no record can "
                "be found by its number: leave config.data.stream out, unpack them, or convert "
                "them (python -m vit_dist.convert)"
            )
        # `stream` as given; without it a bucket is streamed, where reading by index is slow.
        if stream or compressed or (self._remote and stream is None):
            return False
        if self._remote and READ_AHEAD_VARIABLE not in os.environ:
            logging.warning(
                "%s: TensorFlow fetches 64 MB of a bucket for each record that is read by index; "
                "set %s=262144 in the environment, or leave config.data.stream out",
                self,
                READ_AHEAD_VARIABLE,
            )
        return True

    def _locate(self, index: int) -> tuple[int, np.int64]:
        # The last file whose first example is not behind `index`; a file without examples is passed
        # over, as the one after it begins with the same number.
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return file, self._table.offsets[file][index - self._starts[file]]

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        if not self.indexable:
            return super().fetch(indices)
        if self._tables is None:
            self._tables = base.on_host(
                lambda: {
                    "file": tf.constant([os.fsencode(file) for file in self.files]),
                    "start": tf.constant(self._starts),
                    "offset": tf.constant(np.concatenate(self._table.offsets)),
                }
            )
        table = self._tables
        # Only names and offsets are looked up here; each record is read in `decode_record`, in
        # parallel.
        file = tf.searchsorted(table["start"], indices, side="right") - 1
        return {
            "file": tf.gather(table["file"], file),
            "offset": tf.gather(table["offset"], indices),
        }

    def decode_record(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        if self.indexable:
            return self._keys.parse(read_record(record["file"], record["offset"]))
        return self._keys.parse(record["record"])

    def load(self, index: int) -> tuple[bytes, int]:
        if self._table.compression:
            return super().load(index)
        file, offset = self._locate(index)
        return self._keys.load(load_record(self.files[file], offset))

    def peek(self, index: int) -> tuple[bytes, int]:
        file, offset = self._locate(index)
        # In Python: TensorFlow would start its runtime, and a device with it.
        record = read_unverified(self.files[file], int(offset), self._table.compression)
        return self._keys.load(record)

    def stream(self, *, seed: tf.Tensor | None, epoch: tf.Tensor | int) -> tf.data.Dataset:
        base.log_streaming(self)
        return stream_records(
            [str(file) for file in self.files],
            [0] * len(self.files),
            self.file_lengths(),
            seed=seed,
            epoch=epoch,
            compression=self._table.compression,
        )

    def file_lengths(self) -> list[int]:
        return np.diff(self._starts).tolist()

    def follow(self, order: str) -> None:
        # Plain files can be read either way, whatever config.data.stream says for a new run.
        if order == base.BY_INDEX and not self._table.compression:
            self.indexable = True
        # Whether the streams are the same is checked below, by their lengths.
        elif order.startswith(base.STREAMED):
            self.indexable = False
        super().follow(order)  # refuses what is left

    def names(self) -> list[str]:
        counts = zip(self.files, self.file_lengths(), strict=True)
        # With the count of each file: files of one name may hold other examples.
        return [f"{file.name} {count}" for file, count in counts]

    def sizes(self) -> int:
        # Known from the table, so that it costs nothing in a bucket either.
        return checksum(map(str, self._table.sizes))

    def locations(self) -> list[str]:
        return [str(file) for file in self.files]

    def looked_at(self) -> list[int]:
        # From a bucket one example costs a read of 64 MB; in a compressed file, unpacking all that
        # comes before it.
        return [0] if self._remote or self._table.compression else sampled(self.num_examples)

    def describe(self, index: int) -> str:
        file, offset = self._locate(index)
        at = "unpacked byte" if self._table.compression else "byte"
        return f"the record at {at} {offset} of {self.files[file]} (example {index} of {self})"

    def find_damage(self) -> str | None:
        if self.indexable:  # then each record is checked when it is read
            return None
        files = [str(file) for file in self.files]
        cut = find_cut(files, self.file_lengths(), self._table.compression)
        return cut and f"{cut}; copy it again"


def _matching(pattern: str) -> list[epath.Path]:
    """Returns the files that a pattern stands for, without our own tables beside them."""
    path = paths.expand(pattern)
    if path.is_file():  # its name may hold brackets, which would be wildcards
        return [path]
    # Not tf.io.gfile.glob, which takes brackets in the folder's name for wildcards.
    found = path.parent.glob(path.name) if path.parent.is_dir() else []
    files = sorted(
        (f for f in found if not f.name.startswith(".") and not f.name.endswith((SUFFIX, ".tmp"))),
        key=str,
    )
    if files:
        return files
    hint = "set config.data.files, e.g. DIR/{split}-*"
    if any(character in str(path.parent) for character in "*?"):
        hint += "; wildcards may stand in the last part of the path only"
    raise ConfigError(f"no file matches {pattern}: {hint}")


def _class_names(num_classes: int | None, class_file: str | None) -> tuple[str, ...]:
    if class_file is None:
        if num_classes is None or num_classes < 1:
            raise ConfigError("a tfrecord source needs num_classes or class_file, which names them")
        return tuple(str(i) for i in range(num_classes))
    try:
        # utf-8-sig also takes a file with a byte order mark, as Windows' editors write it.
        text = paths.expand(class_file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"config.data.class_file {class_file} is not UTF-8: {error}; save it as UTF-8"
        ) from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    names = [line for line in lines if line]
    if num_classes == len(lines) > len(names):
        # As many lines as classes: a blank line stands for a class without a name.
        names = [line or f"class {i}" for i, line in enumerate(lines)]
    elif len(names) < len(lines):
        blank = len(lines) - len(names)
        logging.warning("%s: %d blank lines between names are skipped", class_file, blank)
    if not names:
        raise ConfigError(
            f"config.data.class_file {class_file} names 0 classes: it holds no text. Write the "
            "name of each class into it, one a line, or set config.data.num_classes instead"
        )
    if num_classes not in (None, len(names)):
        raise ConfigError(
            f"{class_file} names {len(names)} classes, and num_classes is {num_classes}: leave "
            "config.data.num_classes out, or correct one of them"
        )
    return base.distinct_names(names)


def _count_of(split: str, counts: Mapping[str, int] | None) -> int | None:
    if counts is None:
        return None
    # None, for a split without a number, is refused below.
    count = counts.get(split) if isinstance(counts, Mapping) else None
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(
            f"config.data.counts must give the number of examples of each split that is opened, "
            f"such as {{{split!r}: 50000}}, got {counts!r}"
        )
    return count


def _check_count(found: int, expected: int | None, pattern: str) -> None:
    if expected not in (None, found):
        raise DataError(
            f"the files {pattern} hold {found} examples instead of the {expected} of "
            "config.data.counts: one is missing, or has been cut between two records. Copy them "
            "again, or correct that number"
        )
