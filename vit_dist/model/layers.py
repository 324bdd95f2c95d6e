"""The layers a Vision Transformer is made of.

Shapes: B batch, N tokens, D width, H heads, K = D / H, M hidden width of the MLP.

Every layer has an argument `form`, which changes speed and not the numbers (but for the masks of
`Dropout`): "matrix" for CPUs and GPUs, "tensor" for TPUs (see `Linear`).
"""

import functools
from typing import Any

import keras
import tensorflow as tf

from vit_dist.model.attention import Attention
from vit_dist.model.dropout import Dropout, DropPath
from vit_dist.model.linear import Linear
from vit_dist.model.memory import rematerialized_layers
from vit_dist.model.norm import LAYER_NORM_EPSILON, layer_norm


def gelu(x: tf.Tensor, kind: str) -> tf.Tensor:
    """Gaussian error linear unit (arXiv 1606.08415): "erf" exact, "tanh" its approximation.

    Args:
      x: any shape, floating.
      kind: "erf" or "tanh".
    """
    # tf.nn.gelu computes the exact GELU by erfc, which keeps relative precision for very negative
    # x, where 1 + erf(x) cancels: 16 bits need that. In float32 the error of cancelling is below
    # 1e-7, and XLA takes half as long for erf as for erfc (4 % of a step of Ti/16).
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
            # Small, so that a deep network begins near the identity.
            initializer=keras.initializers.Constant(self.init_value),
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x * self.gamma


class PatchEmbedding(keras.layers.Layer):
    """Cuts images into patches and projects each: a convolution with stride = kernel.

    (B, height, width, C) -> (B, N, D). The kernel is kept in the convolution's layout (p, q, C, D).
    The matrix form cuts the image into patches and multiplies one matrix. A TPU would move the
    image several times for that (10 % of a step's bytes), so the tensor form is a convolution.
    """

    def __init__(self, width: int, patch: tuple[int, int], *, form: str = "matrix", **kwargs: Any):
        super().__init__(**kwargs)
        self.width, self.patch, self.form = width, tuple(patch), form

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width, "patch": self.patch, "form": self.form}

    def build(self, input_shape: Any) -> None:
        # Initial values come from vit.initialize, which overwrites Keras's.
        self.kernel = self.add_weight(
            name="kernel", shape=(*self.patch, input_shape[-1], self.width)
        )
        self.bias = self.add_weight(name="bias", shape=(self.width,), initializer="zeros")

    def call(self, images: tf.Tensor) -> tf.Tensor:
        (p, q), (height, width, channels) = self.patch, images.shape[1:]
        # Static numbers: ViT checks that patches divide the image.
        rows, columns = height // p, width // q
        if self.form == "tensor":
            # Stride = kernel: the windows of the convolution are the patches.
            kernel, bias = (tf.convert_to_tensor(v) for v in (self.kernel, self.bias))
            x = tf.nn.conv2d(images, kernel, (p, q), "VALID") + bias
            return tf.reshape(x, (-1, rows * columns, self.width))
        # (B, height, width, C) -> (B, rows, p, columns, q, C) -> (B, rows, columns, p, q, C): then
        # one patch's p * q * C numbers lie in the order of the kernel's first three axes.
        x = tf.reshape(images, (-1, rows, p, columns, q, channels))
        x = tf.transpose(x, (0, 1, 3, 2, 4, 5))
        # (p, q, C, D) -> (p * q * C, D).
        kernel = tf.reshape(tf.convert_to_tensor(self.kernel), (-1, self.width))
        x = tf.matmul(tf.reshape(x, (-1, p * q * channels)), kernel)
        x = x + tf.convert_to_tensor(self.bias)
        return tf.reshape(x, (-1, rows * columns, self.width))


class Mlp(keras.layers.Layer):
    """Dense, GELU, Dense: (B, N, D) -> (B, N, M) -> (B, N, D), dropout after each."""

    def __init__(
        self,
        hidden: int,
        *,
        gelu: str = "tanh",
        dropout: float = 0.0,
        form: str = "matrix",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self._config = {"hidden": hidden, "gelu": gelu, "dropout": dropout, "form": form}
        self.hidden, self.gelu, self.form = hidden, gelu, form
        # Two layers, as each has a mask of its own, by the layer's path.
        self.drop_0 = Dropout(dropout, form=form, name="dropout_0", dtype=self.dtype_policy)
        self.drop_1 = Dropout(dropout, form=form, name="dropout_1", dtype=self.dtype_policy)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}

    def build(self, input_shape: Any) -> None:
        shared: dict[str, Any] = {"form": self.form, "dtype": self.dtype_policy}
        # Made here and not in __init__, because the width of the second follows from the input.
        self.dense_0 = Linear(self.hidden, name="dense_0", **shared)
        self.dense_1 = Linear(input_shape[-1], name="dense_1", **shared)
        self.dense_0.build(input_shape)
        self.dense_1.build((*input_shape[:-1], self.hidden))
        self.drop_0.build(input_shape)
        self.drop_1.build(input_shape)

    def call(self, x: tf.Tensor, training: bool = False, seed: tf.Tensor | None = None):
        x = gelu(self.dense_0(x), self.gelu)  # (B, N, M)
        x = self.drop_0(x, training=training, seed=seed)
        return self.drop_1(self.dense_1(x), training=training, seed=seed)


class EncoderBlock(keras.layers.Layer):
    """A pre-LN transformer block: x + attention(LN(x)), then x + mlp(LN(x)).

    Dropout, LayerScale and stochastic depth act on each branch, in this order, before it is added.
    The arguments are those of `ViT` and `Attention`; `hidden` is M.
    """

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
        recompute_attention: bool = False,
        recompute_mlp: bool = False,
        attention_block: int | None = None,
        norm_epsilon: float = LAYER_NORM_EPSILON,
        form: str = "matrix",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self._config: dict[str, Any] = {
            "num_heads": num_heads,
            "hidden": hidden,
            "gelu": gelu,
            "qkv_bias": qkv_bias,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "drop_path": drop_path,
            "layer_scale": layer_scale,
            "softmax": softmax,
            "recompute_attention": recompute_attention,
            "recompute_mlp": recompute_mlp,
            "attention_block": attention_block,
            "norm_epsilon": norm_epsilon,
            "form": form,
        }
        self.recompute_mlp = recompute_mlp
        dtype = self.dtype_policy
        shared: dict[str, Any] = {"form": form, "dtype": dtype}
        self.norm_0 = layer_norm("norm_0", epsilon=norm_epsilon, **shared)
        self.attention = Attention(
            num_heads,
            qkv_bias=qkv_bias,
            dropout=attention_dropout,
            softmax=softmax,
            recompute=recompute_attention,
            block_size=attention_block,
            name="attention",
            **shared,
        )
        self.drop = Dropout(dropout, name="dropout", **shared)
        self.norm_1 = layer_norm("norm_1", epsilon=norm_epsilon, **shared)
        self.mlp = Mlp(hidden, gelu=gelu, dropout=dropout, name="mlp", **shared)
        # One LayerScale and one stochastic depth for each of the two branches.
        self.scales: list[LayerScale] = []
        if layer_scale is not None:
            self.scales = [
                LayerScale(layer_scale, name=f"layer_scale_{i}", dtype=dtype) for i in range(2)
            ]
        self.paths = [DropPath(drop_path, name=f"drop_path_{i}", dtype=dtype) for i in range(2)]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}

    def build(self, input_shape: Any) -> None:
        # Built here, so that weights can be loaded before the first call.
        parts: list[Any] = [self.norm_0, self.attention, self.drop, self.norm_1, self.mlp]
        for layer in (*parts, *self.scales, *self.paths):
            layer.build(input_shape)

    def _branch(self, y: tf.Tensor, index: int, **mode: Any) -> tf.Tensor:
        if self.scales:
            y = self.scales[index](y)
        return self.paths[index](y, **mode)

    def _normed_mlp(self, x: tf.Tensor, **mode: Any) -> tf.Tensor:
        return self.mlp(self.norm_1(x), **mode)

    def call(
        self,
        x: tf.Tensor,
        training: bool = False,
        seed: tf.Tensor | None = None,
        return_weights: bool = False,
    ):
        """(B, N, D) -> (B, N, D), and the attention weights (B, H, N, N) if asked."""
        # One seed for all layers: each mixes its own path into it (see `Dropout`).
        mode = {"training": training, "seed": seed}
        # Pre-LN: the LayerNorm is in the branch, and x itself is never normalised.
        y = self.attention(self.norm_0(x), return_weights=return_weights, **mode)
        # Weights are only made where they are asked for: (B, H, N, N) is the largest tensor here.
        y, weights = y if return_weights else (y, None)
        x = x + self._branch(self.drop(y, **mode), 0, **mode)
        if self.recompute_mlp and training:
            # With its LayerNorm: what is kept is x, which the residual keeps anyway.
            run = functools.partial(self._normed_mlp, training=True)
            y = rematerialized_layers(run, [self.norm_1, self.mlp], x, seed=seed)
        else:
            y = self._normed_mlp(x, **mode)
        x = x + self._branch(y, 1, **mode)
        return (x, weights) if return_weights else x


class MapHead(keras.layers.Layer):
    """Attention pooling with one learned probe (Zhai et al., arXiv 2106.04560): (B,N,D)->(B,D).

    The probe is the only query: y = attention(probe, x), then y + mlp(LN(y)). The arguments are
    those of `EncoderBlock`.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        hidden: int,
        gelu: str = "tanh",
        norm_epsilon: float = LAYER_NORM_EPSILON,
        form: str = "matrix",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self._config: dict[str, Any] = {
            "num_heads": num_heads,
            "hidden": hidden,
            "gelu": gelu,
            "norm_epsilon": norm_epsilon,
            "form": form,
        }
        shared: dict[str, Any] = {"form": form, "dtype": self.dtype_policy}
        self.attention = Attention(num_heads, name="attention", **shared)
        self.norm = layer_norm("norm", epsilon=norm_epsilon, **shared)
        self.mlp = Mlp(hidden, gelu=gelu, name="mlp", **shared)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}

    def build(self, input_shape: Any) -> None:
        self.probe = self.add_weight(name="probe", shape=(1, 1, input_shape[-1]))
        # (B, N, D) serves for the probe too: layers read the width from it alone.
        for layer in (self.attention, self.norm, self.mlp):
            layer.build(input_shape)

    def call(self, x: tf.Tensor, return_weights: bool = False):
        """(B, N, D) -> (B, D), and the probe's attention weights (B, H, 1, N) if asked."""
        # One query for each image of the batch.
        probe = tf.tile(tf.cast(self.probe, x.dtype), (tf.shape(x)[0], 1, 1))
        y = self.attention(probe, x, return_weights=return_weights)
        y, weights = y if return_weights else (y, None)
        pooled = (y + self.mlp(self.norm(y)))[:, 0]  # (B, 1, D) -> (B, D)
        return (pooled, weights) if return_weights else pooled
