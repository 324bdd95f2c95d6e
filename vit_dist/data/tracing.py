"""Tracing ops without a device, to learn what comes out before any device is started."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf


def switch(index: tf.Tensor, branches: Sequence[Callable]):
    """Returns `branches[index]()`: a tf.switch_case for ops, which `output_spec` can trace."""
    if len(branches) == 1:
        return branches[0]()
    if not is_deviceless():
        return tf.switch_case(index, branches)
    *first, last = branches
    return tf.case([(tf.equal(index, i), fn) for i, fn in enumerate(first)], default=last)


def is_deviceless() -> bool:
    """Whether ops are being traced in a `deviceless_graph`."""
    return not (tf.executing_eagerly() or tf.inside_function())


@contextlib.contextmanager
def deviceless_graph() -> Iterator[None]:
    """A graph in which tracing initialises no device.

    The branches of version 2 control flow are functions, which are registered with the devices, so
    that strategies could no longer configure those; version 1's are plain nodes. The only public
    switch is global to the process.
    """
    enabled = tf.compat.v1.control_flow_v2_enabled()
    tf.compat.v1.disable_control_flow_v2()
    try:
        with tf.Graph().as_default():
            yield
    finally:
        if enabled:
            tf.compat.v1.enable_control_flow_v2()
