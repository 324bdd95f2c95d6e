"""Numbers out of the bytes of a file, as ops of TensorFlow's graph.

What TensorFlow's own decoders get wrong is mended by reading the file's header here. A Python
function would be shorter, but neither the hosts of a TPU pod nor the workers of a data service can
call one. This code becomes part of every input pipeline's graph, and a graph takes TensorFlow half
a millisecond a node to make: so it is written to need few nodes, and few branches, as each of these
is a function of its own, which TensorFlow optimises for every pipeline.
"""

import functools
from collections.abc import Callable

import tensorflow as tf

from vit_dist.data.tracing import is_deviceless

# Of an image. Pillow refuses more than 2.7 times as many; a damaged header may say anything.
MAX_PIXELS = 1 << 26
PIXELS = tf.TensorSpec((None, None, 4), tf.uint8)  # red, green, blue, alpha
COLORS = tf.TensorSpec((None, None, 3), tf.uint8)


def numbers(data: tf.Tensor, at, count: int, kind: tf.DType = tf.uint8) -> tf.Tensor:
    """Returns `count` numbers of type `kind`, lowest byte first, from place `at` on, as int32.

    Beyond the end of the data they are 0.

    Raises:
      InvalidArgumentError: `at` itself lies beyond the end.
    """
    size = count * kind.size
    # fixed_length fills up with zeros where the data end early; without it, decode_raw fails if the
    # bytes are no whole number of `kind`.
    raw = tf.io.decode_raw(tf.strings.substr(data, at, size), kind, fixed_length=size)
    return tf.cast(tf.ensure_shape(raw, (count,)), tf.int32)


def read(data: tf.Tensor, at, count) -> tf.Tensor:
    """Returns the `count` bytes from place `at` on, (count,) uint8; fewer where the data end."""
    # substr gives what there is, so a count that is too large needs no check.
    return tf.io.decode_raw(tf.strings.substr(data, at, count), tf.uint8)


def has(data: tf.Tensor, at: int, text: bytes) -> tf.Tensor:
    """Returns whether these bytes stand at a place that is not beyond the end, () bool."""
    return tf.equal(tf.strings.substr(data, at, len(text)), text)


def require(data: tf.Tensor, condition: tf.Tensor, message: str, *values: tf.Tensor) -> tf.Tensor:
    """Returns `data` for what needs `condition`; InvalidArgumentError where that does not hold.

    Args:
      data: Any tensor; only what is computed from the one returned waits for the check.
      condition: () bool.
      message: What is wrong, with "{}" for each of `values`.
      *values: () int32 each.
    """
    # The text is made of tensors: the numbers are known only when a file is read.
    said = tf.strings.format(message, values) if values else message
    # The bare op: tf.debugging.Assert puts it into a branch, which is two functions more.
    check = tf.raw_ops.Assert(condition=condition, data=[said])
    # identity() is the node that waits for the check; ops on its result wait for it in turn.
    with tf.control_dependencies([check]):
        return tf.identity(data)


def within(data: tf.Tensor, at: tf.Tensor | int) -> tf.Tensor:
    """Returns a file's bytes for what reads from place `at` on; InvalidArgumentError beyond them.

    The message of tf.strings.substr holds the bytes, and where these are no UTF-8 Python raises a
    UnicodeDecodeError in place of TensorFlow's error.
    """
    inside = (at >= 0) & (at <= tf.strings.length(data))
    return require(data, inside, "a file that is cut off, or points beyond its end")


def one_node(
    output: tf.TensorSpec, *more: tf.TensorSpec, rare: bool = True
) -> Callable[[Callable], Callable]:
    """Makes a function of a file's bytes, () string -> `output`, one node of graphs that call it.

    The function is traced once in a process, and not at all where only shapes are asked for.

    Args:
      output: What it returns.
      *more: What it takes behind the bytes.
      rare: Whether few files need it. A graph visits every node of a branch, even of one that is
        not taken: the nodes for rare kinds of files would cost each JPEG a tenth of its time. So
        they stay apart, and TensorFlow makes them ready when the first such file is met.
    """
    # Without the first TensorFlow puts the function's nodes back into the graph that calls it.
    # Without the second it optimises the function for each pipeline, used or not; functions of
    # tf.data it leaves until they are called.
    apart = {"_noinline": True, "_tf_data_function": True}

    def decorate(function: Callable) -> Callable:
        called = tf.function(
            function,
            input_signature=[tf.TensorSpec((), tf.string), *more],
            autograph=False,
            experimental_attributes=apart if rare else None,
        )

        @functools.wraps(function)
        def call(*inputs: tf.Tensor) -> tf.Tensor:
            # The graph that only asks for shapes: a call would make the function, which needs a
            # device.
            if is_deviceless():
                return tf.compat.v1.placeholder(output.dtype, output.shape)
            # What is called may know less of its shape than `output` says.
            return tf.ensure_shape(called(*inputs), output.shape)

        return call

    return decorate
