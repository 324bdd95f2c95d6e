"""What a source of labelled images offers to the pipeline, whichever kind it is."""

import abc
import collections
import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from vit_dist.config.errors import DataError
from vit_dist.data import order
from vit_dist.data.sources import labels as labels_lib
from vit_dist.data.sources.fingerprint import checksum, sampled
from vit_dist.data.sources.preparation import Preparation

# How messages of `read_records` begin.
MISSING, CORRUPT = "the file is missing", "the storage is damaged"
# How a source's examples come in training; see Source.order.
BY_INDEX, STREAMED = "index", "stream"


class Source(abc.ABC):
    """A labelled set of images. Making one reads tables and headers, and touches no device.

    An *indexable* source reads any example by its number: `fetch` takes the numbers of a whole
    batch and returns *records* (cheap to move: paths, serialized examples, small arrays), and
    `decode_record` turns one record into an example. A stream-only source (`indexable` is False)
    has `stream` in place of `fetch`.

    Attributes:
      name: What messages call the source, e.g. "folder".
      split: The split that was opened.
      num_examples: Number of examples in the split.
      num_classes: Number of classes. Labels are int32 in [0, num_classes); that each is, the
        pipeline checks when it makes the example.
      class_names: Their names, in the order of the labels; all distinct.
      indexable: Whether `fetch` and `read` work; `stream` does otherwise.
      portable: Whether `fetch`, `decode_record` and `stream` call no Python: then their graph also
        runs in other processes, such as tf.data services and the remote hosts of a TPU slice.
      encoded: Whether "image" is the bytes of an image file, else it is a uint8 array.
      element_spec: tf.TensorSpec of each entry of one example, without a batch dimension.
      first_label: The stored number of the first class, where that is an option; else None.
      prepared: How the images were resized beforehand; None where they were not, or nobody knows.
      label_sets: None for one label an example. Else "label" is a float32 row (num_classes,) with 1
        for each right class, of which an example may have none; and this is a checksum that tells
        the sets of labels from others.
    """

    name: str
    split: str
    num_examples: int
    class_names: tuple[str, ...]
    indexable: bool = True
    portable: bool = True
    encoded: bool = True
    element_spec: dict[str, tf.TensorSpec]
    first_label: int | None = None
    prepared: Preparation | None = None
    label_sets: int | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __str__(self) -> str:
        return f"{self.name}:{self.split}"

    def prepare(self) -> None:  # noqa: B027 (most sources have nothing to do)
        """Downloads or converts what is still missing; does nothing when all is there."""

    def place(self, positions: tf.Tensor, *, seed: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the epoch and the example number at each position of a run; (B,) int64 each."""
        return order.make_order(positions, num_examples=self.num_examples, seed=seed)

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the records of `indices` ((B,) int64), each entry with a leading B."""
        raise TypeError(f"{self} can only be streamed: it has no fetch()")

    def decode_record(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Returns the example (as in `element_spec`) of one unbatched record."""
        return record

    def read(self, index: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the example number `index` (scalar int64), raw: nothing is decoded."""
        # fetch takes a batch, so this is a batch of one; its axis goes again.
        records = self.fetch(tf.reshape(tf.cast(index, tf.int64), (1,)))
        return self.decode_record({key: value[0] for key, value in records.items()})

    def load(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """Returns image (encoded, or uint8 (H, W, C)) and label of an example, for threads.

        Raises:
          DataError, FileNotFoundError: The example is damaged or missing.
          OSError: The storage fails, which says nothing of the example.
        """
        raise TypeError(f"{self} can only be streamed: it has no load()")

    def peek(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """As `load`, to look before a device starts; checksums may go unverified."""
        return self.load(index)

    def stream(self, *, seed: tf.Tensor | None, epoch: tf.Tensor | int) -> tf.data.Dataset:
        """Returns one epoch's records, each with its "index" (scalar int64) in the files.

        Args:
          seed: (2,) int32: the order is a pure function of it and `epoch`. None: the files' order.
          epoch: Number of the epoch.
        """
        raise TypeError(f"{self} is read by index: it has no stream()")

    def describe(self, index: int) -> str:
        """Returns where example `index` is stored, for messages."""
        return f"example {index} of {self}"

    @property
    def order(self) -> str:
        """What decides the order of training beside seed and number of examples.

        BY_INDEX, or for a stream STREAMED with a checksum of its files' lengths, because a stream
        is shuffled by files and blocks of records.
        """
        if self.indexable:
            return BY_INDEX
        # Files of other lengths are cut into other blocks, and so come in another order.
        return f"{STREAMED} {checksum(map(str, self.file_lengths())):08x}"

    def follow(self, order: str) -> None:
        """Takes over the `order` of a run that is to be resumed.

        Raises:
          DataError: This source cannot; says what to do.
        """
        if order == self.order:
            return
        if self.indexable:
            was, now = "streamed the files", "reads by index"
        elif order == BY_INDEX:
            was, now = "read by index", "can only be streamed"
        else:
            was, now = "streamed files of other lengths", "streams these"
        raise DataError(
            f"the run {was}, and {self} {now}: the examples would come in another order. Give the "
            "data in its former format, or start in another workdir with config.resume_from"
        )

    def file_lengths(self) -> Sequence[int]:
        """How many examples each file of a stream holds."""
        return ()

    def fingerprint(self) -> dict[str, Any]:
        """Returns what a resume compares, to notice that the examples have changed meanwhile."""
        # The order is asked for each time, as `follow` may change it; the rest is computed once.
        return {**self._contents, "order": self.order}

    # Cached, as it reads files, and several parts of a run ask for it.
    @functools.cached_property
    def _contents(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "num_examples": self.num_examples,
            "classes": checksum(self.class_names),
            "names": checksum(self.names()),
        }
        if self.prepared is not None:
            found["prepared"] = str(self.prepared)
        if self.label_sets is not None:
            found["label_sets"] = self.label_sets
        # A source that cannot tell the sizes has no such entry, and `fingerprint.compare` skips it.
        sizes = self.sizes()
        return {**found, "sample": self.sample(), **({} if sizes is None else {"sizes": sizes})}

    def names(self) -> Iterable[str]:
        """Returns the names of examples, as far as they have some, without the data's folder."""
        return ()

    def sizes(self) -> int | None:
        """Returns a checksum of the sizes of all files; None where they are not known cheaply."""
        return None

    def locations(self) -> Iterable[str]:
        """Returns the paths of the files that hold the examples, as far as there are some."""
        return ()

    def looked_at(self) -> list[int]:
        """Returns the numbers of a few examples that `peek` reads at little cost; may be none."""
        loads = type(self).load is not Source.load  # a user's own source may do without
        # A stream would have to be read up to each of them.
        return sampled(self.num_examples) if self.indexable and loads else []

    def sample(self) -> list[list[int]]:
        """Returns number and checksum of the image and the label of each example `looked_at`.

        An example that cannot be read has a checksum of 0, so that it may be mended later.
        """
        return [[index, _checksum_of_example(self, index)] for index in self.looked_at()]

    def find_damage(self) -> str | None:
        """Looks for storage that is cut or damaged; says which was found first, and what to do."""
        return None


def check_labels(source: Source, *, lenient: bool) -> None:
    """Looks at a few examples when a source is opened, by `peek`; see `labels.check_sampled`."""
    indices = source.looked_at()
    # Few (fingerprint.NUM_SAMPLED at most): this runs at each start.
    found = labels_lib.look_at(lambda index: source.peek(index)[1], indices)
    # One example that cannot be read may be damaged; if none can, an option is wrong, such as the
    # name of a feature.
    if found and all(label is None for label in found):
        source.peek(indices[0])  # raises what is wrong with all of them
    labels_lib.check_sampled(
        found,
        source.num_classes,
        first_label=source.first_label,
        describe=lambda place: source.describe(indices[place]),
        lenient=lenient,
    )


def _checksum_of_example(source: Source, index: int) -> int:
    try:
        image, label = source.peek(index)
    except (ValueError, FileNotFoundError):
        return 0
    # The label is the checksum's start value, which must be an unsigned number of 32 bits; labels
    # may be negative by mistake.
    data = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    return zlib.crc32(data, label & 0xFFFFFFFF)


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of classes; a name that occurs twice gets its class number behind it.

    ImageNet has two classes "crane", and whoever looks up a class by name must find one of them.
    """
    # "crane", "crane" -> "crane (134)", "crane (517)", by class number.
    counts = collections.Counter(names)
    return tuple(f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names))


def on_host(make):
    """Returns `make()` as eager tensors in host memory, also while a function is being traced.

    Big tables must not become constants of the graph (which is limited to 2 GB and copied for every
    function), nor be placed on the first accelerator, from which each batch would be fetched back.
    """
    # init_scope leaves the graph that is being traced, so that the tensors are eager.
    with tf.init_scope(), tf.device("CPU:0"):
        return make()


def read_records(getitems: Callable[[list[int]], Sequence[bytes]], indices: tf.Tensor) -> tf.Tensor:
    """Returns the records of `indices` ((B,) int64) as (B,) strings, read by a Python function.

    Of what `getitems` raises, FileNotFoundError and ValueError are the data's fault, and become
    tf.errors.InvalidArgumentError; an OSError is the storage's, and becomes UnknownError.
    """

    def read(numbers: np.ndarray) -> np.ndarray:
        try:
            # As objects: numpy would fill bytes of different lengths up with zeros.
            return np.array(getitems([int(i) for i in numbers]), object)
        except FileNotFoundError as error:
            # DataError is a ValueError, of which numpy_function makes InvalidArgumentError; of
            # other errors it makes UnknownError, which is not masked as damage.
            raise DataError(f"{MISSING}: {error.filename}") from error
        except ValueError as error:
            raise DataError(f"{CORRUPT}: {error}") from error

    # Not stateful: the same numbers give the same records.
    records = tf.numpy_function(read, [indices], tf.string, stateful=False)
    return tf.ensure_shape(records, indices.shape)


def log_streaming(source: Source) -> None:
    """Says, once, what starting late costs with a source that can only be streamed."""
    # Once in a process, however many streams are made.
    logging.log_first_n(
        logging.WARNING,
        "%s can only be streamed: starting at step N reads (without decoding) the N * batch size "
        "records before it, and its order is shuffled by file and block, not as a whole. "
        "Convert it (python -m vit_dist.convert), or prepare it with file_format='array_record', "
        "to read by index.",
        1,
        source,
    )
