"""Dropout and stochastic depth with stateless seeds.

Every mask is drawn from the seed passed to call(): a pure function of (seed, step, replica,
micro-batch, layer), so masks differ between replicas and a resumed run draws what it would have
drawn. Keras's own Dropout keeps hidden state: the same mask on every replica, not saved in
checkpoints.
"""

import zlib
from typing import Any

import keras
import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.model.xla import in_xla, random_bytes

# Fixed, because the default "auto_select" gives different numbers on CPU, GPU and TPU.
RNG = "philox"
_BYTES = 256  # values of a byte


class _Masked(keras.layers.Layer):
    """A layer that zeroes a random part of its input while training."""

    def __init__(self, rate: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.rate = rate

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate}

    def build(self, input_shape: Any) -> None:
        # The layer's path without the model's name, as a number: mixed into the seed, it gives
        # every layer masks of its own, and the same ones in each process and at each resume.
        self._salt = zlib.crc32(self.path.split("/", 1)[-1].encode()) & 0x7FFFFFFF
        self.built = True

    def mask_shape(self, shape: tf.Tensor, rank: int) -> tf.Tensor:
        """The shape of the mask for x of this shape; axes of length 1 share one draw."""
        return shape

    def call(self, x: tf.Tensor, training: bool = False, seed: tf.Tensor | None = None):
        """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate).

        Args:
          x: any shape, floating.
          training: if false, x is returned unchanged.
          seed: int32 (2,), required when training with a rate above 0.

        Raises:
          ConfigError: training without a seed.
        """
        if not training or self.rate == 0:
            return x
        if seed is None:
            raise ConfigError(f"{self.path}: training with rate {self.rate} needs call(seed=...)")
        # Without the layer's number, layers of the same shape would get the same mask.
        seed = tf.random.experimental.stateless_fold_in(seed, self._salt, alg=RNG)
        return self.drop(x, seed)

    def drop(self, x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Returns x, entries zeroed and the rest scaled; `seed` is the layer's own."""
        shape = self.mask_shape(tf.shape(x), x.shape.rank)
        draw = tf.random.stateless_uniform(shape, seed, alg=RNG)
        # Scaled by 1 / (1 - rate), so that the expected value is x: nothing changes at inference.
        keep = tf.cast(draw >= self.rate, x.dtype) / tf.cast(1.0 - self.rate, x.dtype)
        return x * keep


class Dropout(_Masked):
    """Inverted dropout (Srivastava et al. 2014) with stateless seeds.

    `form` is that of `Linear`. As "tensor", and compiled by XLA, masks come from the TPU's own
    generator and `rate` is rounded: see `byte_threshold`. There Philox, number by number, would
    take twice the memory traffic of all the rest of a step.
    """

    def __init__(self, rate: float, *, form: str = "matrix", **kwargs: Any):
        super().__init__(rate, **kwargs)
        self.form = form

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "form": self.form}

    def drop(self, x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        if self.form == "tensor" and in_xla():
            return _drop_by_bytes(x, seed, byte_threshold(self.rate))
        return super().drop(x, seed)


def byte_threshold(rate: float) -> int:
    """Returns t of 1 to 255: an entry is dropped if its random byte is below t.

    So the probability is t / 256, the rate rounded to the nearest of them: 0.1 becomes 26/256 =
    0.1016. A finer rate would take more random bits, which are memory traffic. What is kept is
    scaled by 256 / (256 - t), and the expected value is x all the same.
    """
    # No rate above 0 becomes none, and none below 1 drops everything.
    return min(max(round(rate * _BYTES), 1), _BYTES - 1)


def _drop_by_bytes(x: tf.Tensor, seed: tf.Tensor, threshold: int) -> tf.Tensor:
    # What the backward pass keeps is one byte an entry. Drawing the mask again instead, behind a
    # barrier, was tried: it took more memory and 2 % more traffic, as the barrier keeps the
    # gradient and the product with the mask from being one pass over memory.
    kept = random_bytes(tf.shape(x), seed) >= tf.constant(threshold, tf.uint8)
    scale = _BYTES / (_BYTES - threshold)
    # In float32: the nearest that bfloat16 has to 256 / 230 is 1.1094, and not 1.1130.
    return tf.cast(tf.where(kept, scale * tf.cast(x, tf.float32), 0.0), x.dtype)


class DropPath(_Masked):
    """Stochastic depth (Huang et al. 2016): drops a whole branch, example by example."""

    def mask_shape(self, shape: tf.Tensor, rank: int) -> tf.Tensor:
        # (B, 1, 1, ...): one draw for each example, whose branch is kept or dropped as a whole.
        return tf.concat([shape[:1], tf.ones((rank - 1,), tf.int32)], 0)
