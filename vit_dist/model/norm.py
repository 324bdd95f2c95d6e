"""LayerNorm with float32 statistics under every policy."""

from typing import Any

import keras
import tensorflow as tf

LAYER_NORM_EPSILON = 1e-6  # the reference's; Keras's default 1e-3 gives other logits


class LayerNorm(keras.layers.LayerNormalization):
    """LayerNorm (arXiv 1607.06450) in the form that suits the device: see `Linear`.

    Keras computes the variance in a second pass over x. For 16-bit x on a TPU that pass is memory
    traffic, so the "tensor" form takes `normalize`, which needs one.
    """

    def __init__(self, *, form: str = "matrix", **kwargs: Any):
        super().__init__(**kwargs)
        self.form = form

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "form": self.form}

    def call(self, x: tf.Tensor) -> tf.Tensor:
        if self.form == "matrix" or self.compute_dtype == "float32":
            return super().call(x)  # Keras's; on CPUs 3 times faster than `normalize`
        # A TPU, and activations of 16 bits.
        gamma, beta = (tf.convert_to_tensor(v) for v in (self.gamma, self.beta))
        return normalize(x, gamma, beta, self.epsilon)


def layer_norm(
    name: str, dtype: Any, *, epsilon: float = LAYER_NORM_EPSILON, form: str = "matrix"
) -> keras.layers.Layer:
    """LayerNorm with the reference's epsilon, unless told otherwise."""
    return LayerNorm(epsilon=epsilon, form=form, name=name, dtype=dtype)


def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tf.Tensor:
    """LayerNorm with float32 statistics in one pass: the variance as E[x^2] - E[x]^2.

    Meant for x of 16 bits: what cancellation costs in float32 is below the rounding of x itself.
    """
    # Both means come from one reading of x: E[(x - mean)^2] would need the mean first.
    wide = tf.cast(x, tf.float32)
    mean = tf.reduce_mean(wide, axis=-1, keepdims=True)
    square = tf.reduce_mean(tf.square(wide), axis=-1, keepdims=True)
    # Rounding can make the difference slightly negative, of which rsqrt would be NaN.
    scale = tf.math.rsqrt(tf.maximum(square - tf.square(mean), 0.0) + epsilon) * gamma
    return tf.cast((wide - mean) * scale + beta, x.dtype)
