"""What a source of labelled images offers to the pipeline, whichever kind it is."""

import abc
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from vit_dist.data import order

# How messages of `read_records` begin.
MISSING, CORRUPT = "the file is missing", "the storage is damaged"


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
      num_classes: Number of classes; labels are int32 in [0, num_classes).
      class_names: Their names, in the order of the labels.
      indexable: Whether `fetch` and `read` work; `stream` does otherwise.
      portable: Whether its graph runs in other processes: it calls no Python.
      encoded: Whether "image" is the bytes of an image file, else it is a uint8 array.
      element_spec: tf.TensorSpec of each entry of one example, without a batch dimension.
    """

    name: str
    split: str
    num_examples: int
    class_names: tuple[str, ...]
    indexable: bool = True
    portable: bool = True
    encoded: bool = True
    element_spec: dict[str, tf.TensorSpec]

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
        records = self.fetch(tf.reshape(tf.cast(index, tf.int64), (1,)))
        return self.decode_record({key: value[0] for key, value in records.items()})

    def load(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """Returns image (encoded, or uint8 (H, W, 3)) and label of an example, for threads."""
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

    def fingerprint(self) -> dict[str, Any]:
        """Returns what a resume compares, to notice that the examples have changed meanwhile."""
        return {
            "num_examples": self.num_examples,
            "classes": checksum(self.class_names),
            "names": checksum(self.names()),
        }

    def names(self) -> Iterable[str]:
        """What each example is called, as far as it has a name; the order of examples is theirs."""
        return ()

    def find_damage(self) -> str | None:
        """Looks for storage that is cut or damaged; returns a description of the first found."""
        return None


def checksum(names: Iterable[str]) -> int:
    """Returns a CRC-32 of names, which also tells their order and where each ends."""
    crc = 0
    for name in names:
        crc = zlib.crc32(name.encode() + b"\n", crc)
    return crc


def on_host(make):
    """Returns `make()` as eager tensors in host memory, also while a function is being traced.

    Big tables must not become constants of the graph (which is limited to 2 GB and copied for every
    function), nor be placed on the first accelerator, from which each batch would be fetched back.
    """
    with tf.init_scope(), tf.device("CPU:0"):
        return make()


def read_records(getitems: Callable[[list[int]], Sequence[bytes]], indices: tf.Tensor) -> tf.Tensor:
    """Returns the records of `indices` ((B,) int64) as (B,) strings, read by a Python function."""

    def read(numbers: np.ndarray) -> np.ndarray:
        try:
            return np.array(getitems([int(i) for i in numbers]), object)
        # TensorFlow would make UnknownErrors of all of these, and they are the data's fault.
        except FileNotFoundError as error:
            raise ValueError(f"{MISSING}: {error.filename}") from error
        except (RuntimeError, ValueError) as error:  # the former is array_record's
            raise ValueError(f"{CORRUPT}: {error}") from error

    records = tf.numpy_function(read, [indices], tf.string, stateful=False)
    return tf.ensure_shape(records, indices.shape)


def log_streaming(source: Source) -> None:
    """Says, once, what starting late costs with a source that can only be streamed."""
    logging.log_first_n(
        logging.WARNING,
        "%s can only be streamed: starting at step N reads (without decoding) the N * batch size "
        "records before it, and its order is shuffled by file and block, not as a whole. "
        "Prepare it with file_format='array_record' to read by index.",
        1,
        source,
    )
