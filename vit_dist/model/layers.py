"""The layers a Vision Transformer is made of.

Shapes: B batch, N tokens, D width, H heads, K = D / H, M hidden width of the MLP.

Layers compute the same numbers in two forms: "matrix" for CPUs and GPUs, "tensor" for TPUs (see
`contract`).
"""

from typing import Any

import keras
import tensorflow as tf

from vit_dist.model import contract
from vit_dist.model.masks import Dropout, DropPath
from vit_dist.model.memory import blockwise_attention, rematerialized
from vit_dist.model.norm import layer_norm


def gelu(x: tf.Tensor, kind: str) -> tf.Tensor:
    """Gaussian error linear unit (arXiv 1606.08415): "erf" exact, "tanh" its approximation.

    tf.nn.gelu computes the exact one by erfc, which keeps relative precision where 1 + erf cancels:
    16 bits need that. In float32 what cancels is below 1e-7, and erf takes XLA half the time (4 %
    of a step of Ti/16).
    """
    if kind == "tanh" or x.dtype != tf.float32:
        return tf.nn.gelu(x, approximate=kind == "tanh")
    return 0.5 * x * (1.0 + tf.math.erf(x * 0.5**0.5))


class LayerScale(keras.layers.Layer):
    """A learned factor per channel on a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, init_value: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.init_value = init_value

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "init_value": self.init_value}

    def build(self, input_shape: Any) -> None:
        self.gamma = self.add_weight(
            name="gamma",
            shape=(input_shape[-1],),
            initializer=keras.initializers.Constant(self.init_value),
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x * self.gamma


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

    def projection(self) -> contract.Projection:
        """Kernel and bias, cast as the policy wants them."""
        bias = tf.convert_to_tensor(self.bias) if self.use_bias else None
        return tf.convert_to_tensor(self.kernel), bias

    def call(self, x: tf.Tensor, training: bool = False):
        if self.form == "tensor":
            return contract.dense(x, self.projection())
        kernel = tf.convert_to_tensor(self.kernel)
        y = tf.matmul(tf.reshape(x, (-1, x.shape[-1])), kernel)
        if self.use_bias:
            # Not bias_add: XLA takes longer for its gradient, to compile it and to compute it.
            y = y + tf.convert_to_tensor(self.bias)
        if self.activation is not None:
            y = self.activation(y)
        return tf.reshape(y, (-1, *x.shape[1:-1], self.units))


class PatchEmbedding(keras.layers.Layer):
    """Cuts images into patches and projects each: a convolution with stride = kernel, as a matmul.

    (B, height, width, C) -> (B, N, D). The kernel is kept in the convolution's layout (p, q, C, D).
    """

    def __init__(self, width: int, patch: tuple[int, int], *, form: str = "matrix", **kwargs: Any):
        super().__init__(**kwargs)
        self.width, self.patch, self.form = width, tuple(patch), form

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width, "patch": self.patch, "form": self.form}

    def build(self, input_shape: Any) -> None:
        self.kernel = self.add_weight(
            name="kernel", shape=(*self.patch, input_shape[-1], self.width)
        )
        self.bias = self.add_weight(name="bias", shape=(self.width,), initializer="zeros")

    def call(self, images: tf.Tensor) -> tf.Tensor:
        (p, q), (height, width, channels) = self.patch, images.shape[1:]
        rows, columns = height // p, width // q
        x = tf.reshape(images, (-1, rows, p, columns, q, channels))
        x = tf.transpose(x, (0, 1, 3, 2, 4, 5))
        kernel = tf.reshape(tf.convert_to_tensor(self.kernel), (-1, self.width))
        bias = tf.convert_to_tensor(self.bias)
        if self.form == "tensor":
            x = tf.reshape(x, (-1, rows * columns, p * q * channels))
            return contract.dense(x, (kernel, bias))
        x = tf.matmul(tf.reshape(x, (-1, p * q * channels)), kernel) + bias
        return tf.reshape(x, (-1, rows * columns, self.width))


class Attention(keras.layers.Layer):
    """Multi-head dot-product attention (Vaswani et al. 2017), queries from x, keys from context.

    q, k and v are three projections: compiled for a TPU that takes less memory traffic than one
    fused projection. The softmax is float32 under every policy, unless `softmax` is "compute".
    memory.py: recompute, block_size.
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
        config = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        super().__init__(**kwargs)
        self._config = config
        self.num_heads, self.qkv_bias = num_heads, qkv_bias
        self.softmax, self.form = softmax, form
        self.recompute, self.block_size = recompute, block_size
        self.drop = Dropout(dropout, name="dropout", dtype=self.dtype_policy)

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
        if self.form == "tensor":
            return contract.project_to_heads(x, dense.projection(), self.num_heads)
        x = dense(x)
        x = tf.reshape(x, (-1, x.shape[1], self.num_heads, x.shape[2] // self.num_heads))
        return tf.transpose(x, (0, 2, 1, 3))

    def _join(self, y: tf.Tensor) -> tf.Tensor:
        """(B, H, N, K) -> (B, N, D), projected."""
        if self.form == "tensor":
            return contract.project_from_heads(y, self.out.projection())
        y = tf.transpose(y, (0, 2, 1, 3))
        return self.out(tf.reshape(y, (-1, y.shape[1], y.shape[2] * y.shape[3])))

    def _attend(self, query, key, value, *, training: bool, seed: tf.Tensor | None):
        """(B, H, N, K), twice (B, H, N', K) -> (B, H, N, K), and the weights (B, H, N, N')."""
        dtype = "float32" if self.softmax == "float32" else value.dtype
        logits = tf.cast(tf.matmul(query, key, transpose_b=True), dtype)
        # Softmax with the division after the product with the values, as in FlashAttention-2
        # (arXiv 2307.08691): the backward pass then needs one (B, H, N, N) tensor fewer.
        peak = tf.stop_gradient(tf.reduce_max(logits, axis=-1, keepdims=True))
        weights = tf.exp(logits - peak)
        total = tf.reduce_sum(weights, axis=-1, keepdims=True)
        # Not in float16, where values summed over many tokens would overflow, nor on TPUs, whose
        # compiler keeps the sums and divides again where it needs to.
        if value.dtype == tf.float16 or self.form == "tensor":
            weights, total = weights / total, tf.ones_like(total)
        dropped = self.drop(tf.cast(weights, value.dtype), training=training, seed=seed)
        return tf.matmul(dropped, value) / tf.cast(total, value.dtype), weights / total

    def call(
        self,
        x: tf.Tensor,
        context: tf.Tensor | None = None,
        training: bool = False,
        seed: tf.Tensor | None = None,
        return_weights: bool = False,
    ):
        """(B, N, D), context (B, N', D) -> (B, N, D), and the weights (B, H, N, N') if asked."""
        context = x if context is None else context
        query = self._split(self.query, x)
        key, value = self._split(self.key, context), self._split(self.value, context)
        query = query * tf.cast(query.shape[-1] ** -0.5, query.dtype)
        if self.block_size and not return_weights:
            y = blockwise_attention(query, key, value, block_size=self.block_size)
        elif self.recompute and training:
            again = rematerialized(lambda *x: self._attend(*x, training=True, seed=seed)[0])
            y = again(query, key, value)
        else:
            y, weights = self._attend(query, key, value, training=training, seed=seed)
        y = self._join(y)
        return (y, weights) if return_weights else y


class Mlp(keras.layers.Layer):
    """Dense, GELU, Dense: (B, N, D) -> (B, N, M) -> (B, N, D), dropout after each."""

    def __init__(
        self, hidden: int, *, gelu: str = "tanh", dropout: float = 0.0, form: str = "matrix",
        **kwargs: Any,
    ):  # fmt: skip
        super().__init__(**kwargs)
        self._config = {"hidden": hidden, "gelu": gelu, "dropout": dropout, "form": form}
        self.hidden, self.gelu, self.form = hidden, gelu, form
        self.drop_0 = Dropout(dropout, name="dropout_0", dtype=self.dtype_policy)
        self.drop_1 = Dropout(dropout, name="dropout_1", dtype=self.dtype_policy)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}

    def build(self, input_shape: Any) -> None:
        shared: dict[str, Any] = {"form": self.form, "dtype": self.dtype_policy}
        self.dense_0 = Linear(self.hidden, name="dense_0", **shared)
        self.dense_1 = Linear(input_shape[-1], name="dense_1", **shared)
        self.dense_0.build(input_shape)
        self.dense_1.build((*input_shape[:-1], self.hidden))
        self.drop_0.build(input_shape)
        self.drop_1.build(input_shape)

    def call(self, x: tf.Tensor, training: bool = False, seed: tf.Tensor | None = None):
        x = gelu(self.dense_0(x), self.gelu)
        x = self.drop_0(x, training=training, seed=seed)
        return self.drop_1(self.dense_1(x), training=training, seed=seed)


class EncoderBlock(keras.layers.Layer):
    """A pre-LN transformer block: x + attention(LN(x)), then x + mlp(LN(x))."""

    def __init__(
        self,
        *,
        num_heads: int,
        hidden: int,
        gelu: str = "tanh",
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        softmax: str = "float32",
        form: str = "matrix",
        recompute_attention: bool = False,
        attention_block: int | None = None,
        **kwargs: Any,
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        super().__init__(**kwargs)
        self._config = config
        dtype = self.dtype_policy
        shared: dict[str, Any] = {"form": form, "dtype": dtype}
        self.norm_0 = layer_norm("norm_0", **shared)
        self.attention = Attention(
            num_heads, qkv_bias=qkv_bias, dropout=attention_dropout, softmax=softmax,
            recompute=recompute_attention, block_size=attention_block, name="attention", **shared,
        )  # fmt: skip
        self.drop = Dropout(dropout, name="dropout", dtype=dtype)
        self.norm_1 = layer_norm("norm_1", **shared)
        self.mlp = Mlp(hidden, gelu=gelu, dropout=dropout, name="mlp", **shared)
        self.scales: list[LayerScale] = []
        if layer_scale is not None:
            self.scales = [
                LayerScale(layer_scale, name=f"layer_scale_{i}", dtype=dtype) for i in range(2)
            ]
        self.paths = [DropPath(drop_path, name=f"drop_path_{i}", dtype=dtype) for i in range(2)]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}

    def build(self, input_shape: Any) -> None:
        parts = [self.norm_0, self.attention, self.drop, self.norm_1, self.mlp]
        for layer in (*parts, *self.scales, *self.paths):
            layer.build(input_shape)

    def _branch(self, y: tf.Tensor, index: int, **mode: Any) -> tf.Tensor:
        if self.scales:
            y = self.scales[index](y)
        return self.paths[index](y, **mode)

    def call(
        self,
        x: tf.Tensor,
        training: bool = False,
        seed: tf.Tensor | None = None,
        return_weights: bool = False,
    ):
        """(B, N, D) -> (B, N, D), and the attention weights (B, H, N, N) if asked."""
        mode = {"training": training, "seed": seed}
        y = self.attention(self.norm_0(x), return_weights=return_weights, **mode)
        y, weights = y if return_weights else (y, None)
        x = x + self._branch(self.drop(y, **mode), 0, **mode)
        x = x + self._branch(self.mlp(self.norm_1(x), **mode), 1, **mode)
        return (x, weights) if return_weights else x


class MapHead(keras.layers.Layer):
    """Attention pooling with one learned probe (Zhai et al., arXiv 2106.04560): (B,N,D)->(B,D)."""

    def __init__(
        self, *, num_heads: int, hidden: int, gelu: str = "tanh", form: str = "matrix",
        **kwargs: Any,
    ):  # fmt: skip
        super().__init__(**kwargs)
        self._config = {"num_heads": num_heads, "hidden": hidden, "gelu": gelu, "form": form}
        shared: dict[str, Any] = {"form": form, "dtype": self.dtype_policy}
        self.attention = Attention(num_heads, name="attention", **shared)
        self.norm = layer_norm("norm", **shared)
        self.mlp = Mlp(hidden, gelu=gelu, name="mlp", **shared)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}

    def build(self, input_shape: Any) -> None:
        self.probe = self.add_weight(name="probe", shape=(1, 1, input_shape[-1]))
        for layer in (self.attention, self.norm, self.mlp):
            layer.build(input_shape)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        probe = tf.tile(tf.cast(self.probe, x.dtype), (tf.shape(x)[0], 1, 1))
        y = self.attention(probe, x)
        return (y + self.mlp(self.norm(y)))[:, 0]
