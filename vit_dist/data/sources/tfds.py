"""Classification sets of TensorFlow Datasets: by index from ArrayRecord, else streamed."""

import difflib
import functools
import os
import socket
import sys
import urllib.parse
from concurrent import futures

import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath

from vit_dist import paths
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.sources import source as base
from vit_dist.data.sources.fingerprint import checksum, sampled
from vit_dist.data.sources.label_sets import as_row
from vit_dist.data.sources.record_table import (
    FOOTER,
    HEADER,
    NUM_THREADS,
    open_table,
    read_unverified,
    scan,
)
from vit_dist.data.sources.records import Keys, find_cut, read_record, stream_records
from vit_dist.data.sources.shard_reader import Shard, ShardReader
from vit_dist.storage.files import exists, file_size


class TfdsSource(base.Source):
    """A split of a TFDS builder with an `image` and labels. Images stay encoded until the pipe.

    A set that is not prepared yet is prepared at opening, as its splits are not known before.

    Args:
      split: TFDS's syntax, e.g. "train", "train[:99%]", "train+validation".
      name: Name of the builder, with config and version if wanted, e.g. "cifar10:3.0.2".
      data_dir: Where sets are prepared; TFDS's default is ~/tensorflow_datasets.
      file_format: "array_record" (read by index) or "tfrecord" (streamed) for the preparation;
        TFDS's default is tfrecord. A set that is prepared already must have this format.
      check_files: Whether one label outside of the classes, among a few examples that are looked
        at, is an error at opening. If most are, it always is. Not for a stream from a bucket.
      label_key: Feature with the class number, or with a list of those that are right, such as
        "real_label" of imagenet2012_real.

    Raises:
      ConfigError: Unknown name, split or format, a builder without an `image` or such labels, or
        one that cannot be prepared.
    """

    name = "tfds"

    def __init__(
        self,
        split: str,
        name: str,
        data_dir: str | None = None,
        file_format: str | None = None,
        check_files: bool = True,
        label_key: str = "label",
    ):
        self.split = split
        self._keys = Keys("image", label_key)  # as TFDS stores the features
        self._make_builder = functools.partial(_make_builder, name, data_dir, file_format)
        self.builder = self._make_builder()
        features = self.builder.info.features
        label = _label_feature(name, features, label_key)
        # Before anything else: a set that is not prepared knows neither its splits nor their sizes.
        self.prepare()
        self._split_info = _split_info(self.builder, split)
        self.num_examples = self._split_info.num_examples
        if not self.num_examples:
            raise DataError(f"split {split!r} of {name!r} is empty")
        # ArrayRecord is always read by index. TFRecord is streamed, unless a run that is resumed
        # read it by index (`follow`).
        self._array_record = self.builder.info.file_format.value == "array_record"
        self.indexable = self._array_record
        # ArrayRecord is read by a Python library, TFRecord by TensorFlow.
        self.portable = not self._array_record
        self._files = [epath.Path(f.filename) for f in self._split_info.file_instructions]
        # _ends[i] is the number of the example that follows the last one of file i.
        self._ends = np.cumsum(self.file_lengths())
        self._remote = any(map(paths.is_remote, self._files))
        if not self.indexable:
            self._check_sizes()
        several = label is not features[label_key]
        self.class_names = tuple(label.int2str(i) for i in range(label.num_classes))
        self.element_spec = {
            "image": tf.TensorSpec((), tf.string),
            "label": tf.TensorSpec((), tf.int32),
        }
        if several:
            self.label_sets = checksum([self.builder.info.full_name, label_key])
            self.element_spec["label"] = tf.TensorSpec((self.num_classes,), tf.float32)
        elif self._array_record or not self._remote:
            base.check_labels(self, lenient=not check_files)

    def __str__(self) -> str:
        return f"tfds:{self.builder.info.full_name}:{self.split}"

    def prepare(self) -> None:
        if self.builder.info.splits:
            return
        builder = self.builder
        logging.info("preparing %s in %s", builder.info.full_name, builder.data_dir)
        _check_network(builder)
        try:
            builder.download_and_prepare()
        # A download or a data set's parser may raise anything; the remedy is the same.
        except Exception as error:
            # Of several hosts that share a data_dir, the slower ones fail to rename what they made
            # to where it is by now.
            self.builder = self._make_builder()
            if not self.builder.info.splits:
                raise DataError(_preparation_failed(builder, error)) from error
        # Where another host was done before this one began, TFDS returns without having read it.
        if not self.builder.info.splits:
            self.builder = self._make_builder()

    def _check_sizes(self) -> None:
        """Looks for a shard that was cut, also between two records, by the size of all shards.

        Raises:
          DataError: One was; names it.
        """
        mine = {file.filename for file in self._split_info.file_instructions}
        for name in self.builder.info.splits:
            split = self.builder.info.splits[name]
            files = [epath.Path(path) for path in split.filepaths]
            # Only splits of which this one reads a part; a slice such as train[:99%] reads some of
            # train.
            if mine.isdisjoint(map(str, files)):
                continue
            with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
                sizes = pool.map(lambda f: file_size(f) if exists(f) else 0, files)
            # num_bytes counts the data of all records; in the files each record has a header and a
            # footer besides.
            want = split.num_bytes + (HEADER + FOOTER) * split.num_examples
            if sum(sizes) == want:
                continue
            # The sum shows that a file is wrong, but not which: so their records are counted.
            for file, count in zip(files, split.shard_lengths, strict=True):
                found = len(scan(file)) if exists(file) else "no"
                if found != count:
                    raise DataError(
                        f"file {file} holds {found} records instead of {count}: it has been cut or "
                        "removed; prepare or copy it again"
                    )

    @functools.cached_property
    def _reader(self) -> ShardReader:
        files = self._split_info.file_instructions
        return ShardReader([Shard(str(f.filename), f.skip, f.take) for f in files])

    @functools.cached_property
    def _offsets(self) -> list[np.ndarray]:
        """Where the records of each file begin that belong to the split; of a tfrecord set."""
        table = open_table(self._files, f"{self.builder.info.full_name}:{self.split}")
        files = self._split_info.file_instructions
        return [
            # The table is of whole files, of which the split may take a part.
            offsets[file.skip : file.skip + file.take]
            for offsets, file in zip(table.offsets, files, strict=True)
        ]

    @functools.cached_property
    def _tables(self) -> dict[str, tf.Tensor]:
        return base.on_host(
            lambda: {
                "file": tf.constant([os.fsencode(file) for file in self._files]),
                "end": tf.constant(self._ends),
                "offset": tf.constant(np.concatenate(self._offsets)),
            }
        )

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        if not self.indexable:
            return super().fetch(indices)
        if self._array_record:
            return {"record": base.read_records(self._reader.read, indices)}
        # The first file whose end is beyond the index.
        file = tf.searchsorted(self._tables["end"], indices, side="right")
        return {
            "file": tf.gather(self._tables["file"], file),
            "offset": tf.gather(self._tables["offset"], indices),
        }

    def decode_record(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        import tensorflow_datasets as tfds

        by_offset = "offset" in record
        # Where `fetch` gave only a place, the record is read here: for many examples in parallel.
        serialized = (
            read_record(record["file"], record["offset"]) if by_offset else record["record"]
        )
        example = self.builder.info.features.deserialize_example(
            serialized, decoders={"image": tfds.decode.SkipDecoding()}
        )
        label = tf.cast(example[self._keys.label], tf.int32)
        if self.label_sets is not None:
            label = as_row(label, self.num_classes)
        return {"image": example["image"], "label": label}

    def load(self, index: int) -> tuple[bytes | np.ndarray, int]:
        if not self.indexable:
            return super().load(index)
        return self.peek(index)

    def peek(self, index: int) -> tuple[bytes, int]:
        if self._array_record:
            return self._keys.load(self._reader.read([index])[0])
        file = int(np.searchsorted(self._ends, index, side="right"))
        # The example's number within its file, counted from where the split begins in it.
        place = index - (int(self._ends[file]) - self.file_lengths()[file])
        if place == 0 and not self._split_info.file_instructions[file].skip:
            # The first record of a file begins at byte 0, for which no scan is needed.
            return self._keys.load(read_unverified(self._files[file], 0))
        return self._keys.load(read_unverified(self._files[file], int(self._offsets[file][place])))

    def locations(self) -> list[str]:
        return [str(file) for file in self._files]

    def looked_at(self) -> list[int]:
        if self.label_sets is not None:
            return []  # `peek` reads one label
        if self._array_record:
            return sampled(self.num_examples)
        if self._remote:
            return []
        # The first examples of files: all others can only be found by a scan.
        files = self._split_info.file_instructions
        begins = [int(e) - f.take for e, f in zip(self._ends, files, strict=True) if not f.skip]
        return [begins[i] for i in sampled(len(begins))]

    def stream(self, *, seed: tf.Tensor | None, epoch: tf.Tensor | int) -> tf.data.Dataset:
        base.log_streaming(self)
        files = self._split_info.file_instructions
        return stream_records(
            [file.filename for file in files],
            [file.skip for file in files],
            self.file_lengths(),
            seed=seed,
            epoch=epoch,
        )

    def file_lengths(self) -> list[int]:
        return [file.take for file in self._split_info.file_instructions]

    def follow(self, order: str) -> None:
        # A local file can be read either way. From a bucket TensorFlow fetches 64 MB for each
        # record.
        if not self._array_record and not self._remote:
            self.indexable = order == base.BY_INDEX
        super().follow(order)  # refuses what is left

    def find_damage(self) -> str | None:
        if self.indexable:
            return None
        files = self._split_info.file_instructions
        cut = find_cut([f.filename for f in files], [f.examples_in_shard for f in files])
        return cut and f"{cut}; prepare or copy it again"


def _make_builder(name: str, data_dir: str | None, file_format: str | None):
    import tensorflow_datasets as tfds  # here, as it takes seconds and other sources do without

    formats = ("array_record", "tfrecord")
    if file_format is not None and file_format not in formats:
        raise ConfigError(f"file_format={file_format!r} is unknown; it may be one of {formats}")
    # "~" is the home folder, as in every other path of a config.
    data_dir = None if data_dir is None else str(paths.expand(data_dir))
    if not sys.stdout.isatty():
        tfds.disable_progress_bar()  # in a log file each refresh is a line
    try:
        # try_gcs=False: TFDS would look for prepared sets in Google's bucket, and wait where there
        # is no network.
        return tfds.builder(name, data_dir=data_dir, try_gcs=False, file_format=file_format)
    except tfds.core.registered.DatasetNotFoundError:
        # Listing the community's data sets would need the network.
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.split("/")[0].split(":")[0], known, n=3)
        hint = f"; the nearest are {near}" if near else ""
        raise ConfigError(f"TFDS has no data set {name!r}{hint}") from None
    except (ValueError, AssertionError) as error:  # a wrong config, version or format
        raise ConfigError(f"TFDS cannot open {name!r} (data_dir={data_dir}): {error}") from error


def _label_feature(name: str, features, label_key: str):
    """Returns the ClassLabel of a set, also where an example has a sequence of them."""
    import tensorflow_datasets as tfds

    # A set may have a single feature that is no dictionary, and has no items().
    found = dict(features.items()) if hasattr(features, "items") else {}
    label = found.get(label_key)
    if isinstance(label, tfds.features.Sequence):
        label = label.feature
    image = found.get("image")
    if not (isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)):
        listed = {key: type(feature).__name__ for key, feature in found.items()}
        raise DataError(
            f"TFDS set {name!r} is not for classification: it needs the features image: Image and "
            f"{label_key}: ClassLabel (config.data.label_key), and has {listed}"
        )
    return label


def _split_info(builder, split: str):
    splits = builder.info.splits
    try:
        return splits[split]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{builder.info.full_name} has no split {split!r}; it has {sorted(splits)}, and parts "
            f"such as 'train[:99%]' ({error})"
        ) from None


def _check_network(builder) -> None:
    """Fails at once if what is to be downloaded has no reachable host.

    TFDS itself retries for minutes. Files that were placed in downloads/manual need no network.
    """
    downloads = builder.data_dir_root / "downloads"
    # Whatever was downloaded before may be enough; only TFDS itself can tell.
    cached = downloads.exists() and any(path.name != "manual" for path in downloads.iterdir())
    missing = [
        url
        for url, info in (builder.url_infos or {}).items()  # None: a set that downloads nothing
        # Old lists of checksums have no names of files, imagenet2012's among them.
        if not (downloads / "manual" / (info.filename or url.rpartition("/")[2])).exists()
    ]
    if cached or not missing:
        return
    host = urllib.parse.urlparse(missing[0]).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise DataError(_preparation_failed(builder, error)) from None


def _preparation_failed(builder, error: Exception) -> str:
    manual = builder.data_dir_root / "downloads" / "manual"
    urls = "".join(f"\n  {url}" for url in list(builder.url_infos or ())[:8])
    reason = str(error).strip().splitlines() or [""]
    return (
        f"TFDS could not prepare {builder.info.full_name}: {type(error).__name__}: {reason[0]}\n"
        f"Set data_dir to where it is prepared already, prepare it on a machine with network and "
        f"copy {builder.data_path}, or put its files into {manual}"
        + (f":{urls}" if urls else f" ({builder.MANUAL_DOWNLOAD_INSTRUCTIONS})")
    )
