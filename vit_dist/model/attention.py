"""Multi-head attention.

Shapes: B batch, N tokens, D width, H heads, K = D / H.
"""

from typing import Any

import keras
import tensorflow as tf

from vit_dist.model.dropout import Dropout
from vit_dist.model.linear import Linear
from vit_dist.model.memory import blockwise_attention, rematerialized


class Attention(keras.layers.Layer):
    """Multi-head dot-product attention (Vaswani et al. 2017), queries from x, keys from context.

    q, k and v are three projections: compiled for a TPU, three take less memory traffic than one
    fused projection. The softmax is float32 under every policy, unless `softmax` is "compute".

    Args:
      num_heads: H; D must be a multiple of it.
      qkv_bias: whether the three projections have biases; the output projection always has.
      dropout: rate, on the attention weights.
      softmax: "float32", or "compute" for the dtype of the activations.
      form: see `Linear`.
      recompute: whether the backward pass computes logits and weights again; see memory.py.
      block_size: None, or how many keys are attended to at a time; see memory.py.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        softmax: str = "float32",
        form: str = "matrix",
        recompute: bool = False,
        block_size: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self._config: dict[str, Any] = {
            "num_heads": num_heads,
            "qkv_bias": qkv_bias,
            "dropout": dropout,
            "softmax": softmax,
            "form": form,
            "recompute": recompute,
            "block_size": block_size,
        }
        self.num_heads, self.qkv_bias = num_heads, qkv_bias
        self.softmax, self.form = softmax, form
        self.recompute, self.block_size = recompute, block_size
        self.drop = Dropout(dropout, form=form, name="dropout", dtype=self.dtype_policy)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}

    def build(self, input_shape: Any) -> None:
        width, dtype = input_shape[-1], self.dtype_policy
        for name in ("query", "key", "value"):
            dense = Linear(width, use_bias=self.qkv_bias, form=self.form, name=name, dtype=dtype)
            dense.build(input_shape)
            setattr(self, name, dense)
        self.out = Linear(width, form=self.form, name="out", dtype=dtype)
        self.out.build(input_shape)
        self.drop.build(input_shape)

    def _split(self, dense: Linear, x: tf.Tensor) -> tf.Tensor:
        """(B, N, D), projected -> (B, H, N, K)."""
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        if self.form == "tensor":
            # Cutting the last axis into heads copies, as a TPU keeps tensors in tiles. So the small
            # kernel is cut, (D, D) -> (D, H, K), and not the large y: a step of S/16 then accesses
            # 15.5 GB on a v5e, else 18.4.
            y = tf.einsum("bnd,dhk->bnhk", x, tf.reshape(dense.kernel, (-1, *heads)))
            y = y + tf.reshape(dense.bias, heads) if dense.use_bias else y
        else:
            y = tf.reshape(dense(x), (-1, x.shape[1], *heads))
        return tf.transpose(y, (0, 2, 1, 3))  # heads before tokens, for a batched matmul

    def _join(self, y: tf.Tensor) -> tf.Tensor:
        """(B, H, N, K) -> (B, N, D), projected."""
        y = tf.transpose(y, (0, 2, 1, 3))
        return self.out(tf.reshape(y, (-1, y.shape[1], y.shape[2] * y.shape[3])))

    def _attend(self, query, key, value, *, training: bool, seed: tf.Tensor | None):
        """(B, H, N, K), twice (B, H, N', K) -> (B, H, N, K), and the weights (B, H, N, N')."""
        logits = tf.matmul(query, key, transpose_b=True)
        logits = tf.cast(logits, "float32" if self.softmax == "float32" else value.dtype)
        # The plain softmax where the faster form below does not fit. In float16, values summed over
        # many tokens would overflow before the division. On a TPU nothing is gained: its compiler
        # keeps the row sums by itself, and divides again where it needs to.
        if value.dtype == tf.float16 or self.form == "tensor":
            weights = tf.nn.softmax(logits)
            dropped = self.drop(tf.cast(weights, value.dtype), training=training, seed=seed)
            return tf.matmul(dropped, value), weights
        # Softmax with the division after the product with the values, as in FlashAttention-2
        # (arXiv 2307.08691): the backward pass then needs one (B, H, N, N) tensor fewer. The peak
        # is subtracted only against overflow and cancels out, so it needs no gradient.
        peak = tf.stop_gradient(tf.reduce_max(logits, axis=-1, keepdims=True))
        weights = tf.exp(logits - peak)
        total = tf.reduce_sum(weights, axis=-1, keepdims=True)
        dropped = self.drop(tf.cast(weights, value.dtype), training=training, seed=seed)
        return tf.matmul(dropped, value) / tf.cast(total, value.dtype), weights / total

    def _attended(self, query, key, value, seed: tf.Tensor | None = None) -> tf.Tensor:
        """What _attend gives first, while training."""
        return self._attend(query, key, value, training=True, seed=seed)[0]

    def call(
        self,
        x: tf.Tensor,
        context: tf.Tensor | None = None,
        training: bool = False,
        seed: tf.Tensor | None = None,
        return_weights: bool = False,
    ):
        """(B, N, D), context (B, N', D) -> (B, N, D), and the weights (B, H, N, N') if asked."""
        # Without a context this is self-attention; a MapHead's queries come from its probe.
        context = x if context is None else context
        query = self._split(self.query, x)
        key, value = self._split(self.key, context), self._split(self.value, context)
        # Scaling the queries by 1 / sqrt(K) costs N * K products a head; the logits would cost N^2.
        query = query * tf.cast(query.shape[-1] ** -0.5, query.dtype)
        # The blockwise form never holds all weights, so it cannot return them.
        if self.block_size and not return_weights:
            y = blockwise_attention(query, key, value, block_size=self.block_size)
        elif self.recompute and training:
            again = rematerialized(self._attended, seed=seed)
            y = again(query, key, value)
        else:
            y, weights = self._attend(query, key, value, training=training, seed=seed)
        y = self._join(y)
        return (y, weights) if return_weights else y
