"""What exists only where XLA compiles: its optimization barrier, and its generator of random bits.

TensorFlow has an operation for each, but kernels for none: outside of a compiled function they
cannot run. So whoever calls them asks `in_xla` first, and has another way where it says no.
"""

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.ops import control_flow_util

# TensorFlow's number of AUTO_SELECT, XLA's RNG_DEFAULT: a TPU's own generator, in hardware.
_DEFAULT_GENERATOR = 3


def in_xla() -> bool:
    """Whether XLA compiles what is being traced: by jit_compile=True, or under a TPUStrategy."""
    # Both mark the graph that they trace. Bodies of loops and functions inside are graphs of their
    # own, without a mark, so the graphs around are looked at as well.
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def barrier(*tensors: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Returns the tensors, so that nothing computed from them can begin before all are there.

    Nor does the compiler see through it: what is computed from the results is never merged with the
    same expressions of the arguments. Compilers for GPUs and TPUs keep the barrier until they have
    decided what is computed when; the one for CPUs drops it before it merges equal expressions.
    """

    # TensorFlow knows no gradient of its operation.
    @tf.custom_gradient
    def run(*tensors: tf.Tensor):
        held = gen_xla_ops.xla_optimization_barrier(input=list(tensors))
        return tuple(held), lambda *upstream: list(upstream)

    return tuple(run(*tensors))


def random_bytes(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """uint8 of a shape, each of 0 to 255 equally likely: a function of the seed on one device kind.

    Args:
      shape: int32 (rank,), a constant, as tf.shape gives it of a tensor of static shape.
      seed: int32 (2,).
    """
    # The generator's state is 128 bits; JAX repeats the 64 bits of its keys in the same way.
    half = tf.bitcast(seed, tf.uint64)
    _, drawn = gen_xla_ops.xla_rng_bit_generator(
        algorithm=_DEFAULT_GENERATOR,
        initial_state=tf.stack([half, half]),
        shape=shape,
        dtype=tf.uint8,
    )
    return drawn
