"""What a source of labelled images offers to the pipeline, whichever kind it is."""

import abc

import tensorflow as tf
from absl import logging


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
      encoded: Whether "image" is the bytes of an image file, else it is a uint8 array.
      element_spec: tf.TensorSpec of each entry of one example, without a batch dimension.
    """

    name: str
    split: str
    num_examples: int
    class_names: tuple[str, ...]
    indexable: bool = True
    encoded: bool = True
    element_spec: dict[str, tf.TensorSpec]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __str__(self) -> str:
        return f"{self.name}:{self.split}"

    def prepare(self) -> None:  # noqa: B027 (most sources have nothing to do)
        """Downloads or converts what is still missing; does nothing when all is there."""

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

    def find_damage(self) -> str | None:
        """Looks for storage that is cut or damaged; returns a description of the first found."""
        return None


def on_host(make):
    """Returns `make()` as eager tensors in host memory, also while a function is being traced.

    Big tables must not become constants of the graph (which is limited to 2 GB and copied for every
    function), nor be placed on the first accelerator, from which each batch would be fetched back.
    """
    with tf.init_scope(), tf.device("CPU:0"):
        return make()


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
