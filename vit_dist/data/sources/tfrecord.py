"""A source of TFRecord files of tf.train.Example, read by index or streamed."""

import io
import json
import os
import struct
from collections.abc import Mapping
from concurrent import futures

import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath

from vit_dist import paths
from vit_dist.data.sources import source as base
from vit_dist.data.sources.records import Keys, find_cut, read_record, stream_records

# A record: uint64 length, uint32 CRC of it, the data, uint32 CRC of that.
HEADER, FOOTER = 12, 4
NUM_THREADS = 32  # for scanning files, which waits rather than computes
READ_AHEAD_VARIABLE = "GCS_READAHEAD_BUFFER_SIZE_BYTES"  # TensorFlow's, for gs://
READ_AHEAD = 1 << 16  # bytes read at a time while scanning: small records need no seek each


class TfrecordSource(base.Source):
    """TFRecord files, not compressed, of examples with an encoded image and an int64 label.

    At the first opening the headers of all records are scanned for where each begins. That table is
    kept beside the files (or, if they are not writable, scanned each time), so that later openings
    are fast, and a file that has changed since, for instance been cut between two records, is
    noticed. By index, each example costs one seek; streamed, files are read in one go, at the price
    that `base.log_streaming` tells. Both verify the checksums of the records.

    Args:
      split: Replaces {split} in `files`.
      files: Pattern of the files, e.g. "gs://bucket/imagenet/{split}-*-of-*".
      num_classes: Number of classes, or None for as many as `class_file` has lines.
      class_file: Text file with the name of a class per line; by default they are "0", "1", ...
      image_key: Feature with the encoded image.
      label_key: Feature with the class number.
      first_label: The number of the first class; 1 in ImageNet as TF Model Garden stores it.
      counts: Split -> how many examples its files should hold, without which nothing tells that a
        file was cut between two records before it was first opened here.
      stream: Read the files in sequence rather than by index; None: only from a bucket, where
        TensorFlow fetches 64 MB for every record that is read by index.

    Raises:
      ValueError: No file, no class, a file that ends within a record or has changed, or an example
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
    ):
        self._pattern = files.replace("{split}", split)
        remote = paths.is_remote(files)
        self.split = split
        self.indexable = not remote if stream is None else not stream
        if remote and self.indexable and READ_AHEAD_VARIABLE not in os.environ:
            logging.warning(
                "%s: TensorFlow fetches 64 MB of a bucket for each record that is read by index; "
                "set %s=262144 in the environment, or leave config.data.stream out",
                self,
                READ_AHEAD_VARIABLE,
            )
        self.files = _matching(self._pattern)
        self.class_names = _class_names(num_classes, class_file)
        self._keys = Keys(image_key, label_key, first_label)
        self._offsets = _open_table(self.files, self._pattern, _count_of(split, counts))
        self._starts = np.cumsum([0, *(len(offsets) for offsets in self._offsets)])
        self.num_examples = int(self._starts[-1])
        self._tables: dict[str, tf.Tensor] | None = None
        self.element_spec = {
            "image": tf.TensorSpec((), tf.string),
            "label": tf.TensorSpec((), tf.int32),
        }
        if not self.num_examples:
            raise ValueError(f"the files {self._pattern} hold no record")
        _, label = self.peek(0)
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"the first example has label {label + first_label}, outside of first_label="
                f"{first_label} and the {self.num_classes} classes from there on"
            )

    def __str__(self) -> str:
        return f"tfrecord:{self._pattern}"

    def _locate(self, index: int) -> tuple[int, np.int64]:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return file, self._offsets[file][index - self._starts[file]]

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        if not self.indexable:
            return super().fetch(indices)
        if self._tables is None:
            self._tables = base.on_host(
                lambda: {
                    "file": tf.constant([str(file) for file in self.files]),
                    "start": tf.constant(self._starts),
                    "offset": tf.constant(np.concatenate(self._offsets)),
                }
            )
        table = self._tables
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
        file, offset = self._locate(index)
        with tf.device("CPU:0"):
            try:
                record = read_record(tf.constant(str(self.files[file])), tf.constant(offset))
            except tf.errors.OpError as error:
                missing = isinstance(error, tf.errors.NotFoundError)
                raise ValueError(
                    f"{base.MISSING if missing else base.CORRUPT}: {error.message}"
                ) from error
        return self._keys.load(record.numpy())

    def peek(self, index: int) -> tuple[bytes, int]:
        file, offset = self._locate(index)
        with self.files[file].open("rb") as opened:
            opened.seek(offset)
            (length,) = struct.unpack("<Q", opened.read(HEADER)[:8])
            return self._keys.load(opened.read(length))

    def stream(self, *, seed: tf.Tensor | None, epoch: tf.Tensor | int) -> tf.data.Dataset:
        base.log_streaming(self)
        counts = np.diff(self._starts)
        return stream_records(
            self.files, [0] * len(self.files), counts.tolist(), seed=seed, epoch=epoch
        )

    def names(self) -> list[str]:
        counts = np.diff(self._starts)
        return [f"{file.name} {count}" for file, count in zip(self.files, counts, strict=True)]

    def describe(self, index: int) -> str:
        file, offset = self._locate(index)
        return f"the record at byte {offset} of {self.files[file]} (example {index} of {self})"

    def find_damage(self) -> str | None:
        if self.indexable:  # each record tells when it is read
            return None
        return find_cut([str(f) for f in self.files], np.diff(self._starts).tolist())


def _matching(pattern: str) -> list[epath.Path]:
    path = epath.Path(pattern).expanduser()
    files = sorted(path.parent.glob(path.name), key=str) if path.parent.is_dir() else []
    if not files:
        raise ValueError(f"no file matches {pattern}: set config.data.files, e.g. DIR/{{split}}-*")
    return files


def _class_names(num_classes: int | None, class_file: str | None) -> tuple[str, ...]:
    if class_file is None:
        if num_classes is None or num_classes < 1:
            raise ValueError("a tfrecord source needs num_classes or class_file, which names them")
        return tuple(str(i) for i in range(num_classes))
    names = tuple(epath.Path(class_file).expanduser().read_text().splitlines())
    if len(set(names)) < len(names) or num_classes not in (None, len(names)):
        raise ValueError(
            f"{class_file} names {len(names)} classes, {len(set(names))} of them distinct, "
            f"and num_classes is {num_classes}"
        )
    return names


def _count_of(split: str, counts: Mapping[str, int] | None) -> int | None:
    if counts is None:
        return None
    count = counts.get(split) if isinstance(counts, Mapping) else None
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"config.data.counts must give the number of examples of each split that is opened, "
            f"such as {{{split!r}: 50000}}, got {counts!r}"
        )
    return count


def _check_count(offsets: list[np.ndarray], expected: int | None, pattern: str) -> None:
    found = sum(map(len, offsets))
    if expected not in (None, found):
        raise ValueError(
            f"the files {pattern} hold {found} examples instead of the {expected} of "
            "config.data.counts: one is missing, or has been cut between two records. Copy them "
            "again, or correct that number"
        )


def _open_table(files: list[epath.Path], pattern: str, expected: int | None) -> list[np.ndarray]:
    """Returns where the records of each file begin, from the table beside the files or a scan."""
    path = files[0].parent / f"{base.checksum([epath.Path(pattern).name]):08x}.vit_dist_index.npz"
    sizes = {file.name: file.stat().length for file in files}
    if path.exists():
        with np.load(io.BytesIO(path.read_bytes())) as table:
            known = json.loads(str(table["sizes"]))
            offsets = [table[f"at/{file.name}"] for file in files if file.name in known]
        for name in sorted(set(known) | set(sizes)):
            if known.get(name) != sizes.get(name):
                raise ValueError(
                    f"file {files[0].parent / name} has {sizes.get(name, 'no')} bytes, and had "
                    f"{known.get(name, 'no')} when it was indexed: it has been cut or replaced. "
                    f"Copy it again; if the change is meant, remove {path}"
                )
        _check_count(offsets, expected, pattern)
        return offsets
    logging.info("indexing %d files %s", len(files), pattern)
    offsets = []
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for starts in pool.map(scan, files):
            offsets.append(starts)
            logging.log_every_n_seconds(
                logging.INFO, "indexed %d of %d files", 10, len(offsets), len(files)
            )
    _check_count(offsets, expected, pattern)  # before a table of wrong numbers is kept
    table = {f"at/{file.name}": starts for file, starts in zip(files, offsets, strict=True)}
    buffer = io.BytesIO()
    np.savez(buffer, sizes=np.array(json.dumps(sizes)), allow_pickle=False, **table)
    try:
        paths.write_whole(path, buffer.getvalue())
    except OSError as error:
        logging.warning("cannot keep the index as %s, the next start scans again: %s", path, error)
    return offsets


def scan(path: epath.Path) -> np.ndarray:
    """Returns the offsets of all records, int64.

    Raises:
      ValueError: The file ends within a record.
    """
    size, offset = path.stat().length, 0
    starts: list[int] = []
    with path.open("rb") as file:
        window, begin = b"", 0
        while offset < size:
            if not begin <= offset <= begin + len(window) - HEADER:
                file.seek(offset)
                window, begin = file.read(READ_AHEAD), offset
            header = window[offset - begin : offset - begin + HEADER]
            length = struct.unpack("<Q", header[:8])[0] if len(header) == HEADER else size
            if offset + HEADER + length + FOOTER > size:
                raise ValueError(
                    f"file {path} ends within its record {len(starts)} (at byte {offset} of {size})"
                    ": it has been cut, or is no TFRecord file; copy it again"
                )
            starts.append(offset)
            offset += HEADER + length + FOOTER
    return np.array(starts, np.int64)
