"""Tracing ops without a device.

Checking a config asks which shapes a pipe of ops makes before any device is started: strategies can
only be configured until then.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf


def switch(index: tf.Tensor, branches: Sequence[Callable]):
    """Returns `branches[index]()`, for `index` () int32: a tf.switch_case for ops.

    It can also be traced in a `deviceless_graph`.
    """
    if len(branches) == 1:
        return branches[0]()
    # One op that jumps to the branch; it makes a function of each branch.
    if not is_deviceless():
        return tf.switch_case(index, branches)
    # tf.case compares with one number after the other, in tf.conds. These become plain nodes in a
    # deviceless_graph, where tf.switch_case would still make functions.
    *first, last = branches
    return tf.case([(tf.equal(index, i), fn) for i, fn in enumerate(first)], default=last)


def is_deviceless() -> bool:
    """Returns whether ops are being traced in a `deviceless_graph`."""
    # Else ops are run at once, or traced into the graph of a tf.function.
    return not (tf.executing_eagerly() or tf.inside_function())


@contextlib.contextmanager
def deviceless_graph() -> Iterator[None]:
    """A context in which ops become nodes of a graph that no device ever sees.

    Branches and loops of TensorFlow 2's control flow are functions, and making a function
    initialises the devices. TensorFlow 1's control flow is plain nodes. The only public switch
    between the two is global to the process, and is put back in the end.
    """
    # Remembered, as a caller may have switched to TensorFlow 1's control flow itself.
    enabled = tf.compat.v1.control_flow_v2_enabled()
    tf.compat.v1.disable_control_flow_v2()
    try:
        with tf.Graph().as_default():
            yield
    finally:
        if enabled:
            tf.compat.v1.enable_control_flow_v2()
