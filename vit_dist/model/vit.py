"""The Vision Transformer ("An Image is Worth 16x16 Words", arXiv 2010.11929).

Shapes: B batch, N tokens, D width, H heads, C classes; (rows, columns) the grid of patches.
"""

import functools
import re
import zlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.model.layers import Dropout, EncoderBlock, MapHead, PatchEmbedding
from vit_dist.model.memory import rematerialized_layers
from vit_dist.model.norm import layer_norm
from vit_dist.model.posemb import sincos2d
from vit_dist.model.variants import PRECISIONS, as_pair, check_choice, check_vit, needs_cls


@keras.saving.register_keras_serializable("vit_dist")
class ViT(keras.Model):
    """A Vision Transformer classifier. `build_vit` makes one from a variant's name.

    Args:
      image_size: (height, width) in pixels, each divisible by patch_size.
      patch_size: side of a patch in pixels.
      width, depth, mlp_dim, num_heads: D, blocks, hidden width of the MLP, H.
      num_classes: C; 0 for no head: the model then returns features.
      pool: what the head sees: "tok" the cls token, "gap" the mean over the patch tokens, "tok_gap"
        both, concatenated (DINOv2's classifier), "map" attention pooling of the patch tokens,
        "none" every token (the head applies to each).
      posemb: "learned", or the fixed "sincos2d" of the patches.
      rep_size: width of the representation layer (Dense + tanh) before the head; 0 for none.
      dropout: rate, after the position embedding, the attention's output projection, the GELU and
        the MLP's second matrix.
      attention_dropout: rate, on the attention weights.
      drop_path: stochastic depth's rate at the last block.
      drop_path_growth: "linear" from 0 at the first block, or "constant" over all (DeiT III).
      layer_scale: initial value of LayerScale, None for none.
      gelu: "tanh" (vision_transformer, big_vision) or "erf" (timm, Hugging Face, DeiT).
      qkv_bias: whether the query, key and value projections have biases.
      remat: what a training step computes again in its backward pass, to keep less in memory:
        "none", "attention" (logits, softmax and its product with the values), "attention_mlp"
        (these, and the MLP's hidden layer), or "full" (whole blocks).
      attention_block: None, or how many keys attention takes at a time, which saves memory where
        there are many tokens.
      softmax: the dtype of attention's softmax: "float32", or "compute", that of activations, as
        flax and big_vision have it.
      form: "matrix" for CPUs and GPUs, "tensor" for TPUs: two ways to compute the same numbers,
        each the faster one on its devices (see `Linear`).
      cls_token: whether there is a cls token; None for one exactly if `pool` reads it.
      registers: further learned tokens between the cls token and the patches (arXiv 2309.16588).
      prefix_posemb: which tokens before the patches have an entry in the learned table: "cls",
        "all" or "none" (DeiT III, timm's no_embed_class).
      norm_epsilon: of every LayerNorm: 1e-6 in most systems, 1e-12 in Hugging Face's ViT.
      norm_after_pool: whether the last LayerNorm comes after the pooling (timm's fc_norm), and not
        before it.
      channels: colour channels of the images.

    Raises:
      ConfigError: an argument out of range; the message names it and what is allowed.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        mlp_dim: int,
        num_heads: int,
        num_classes: int,
        pool: str = "gap",
        posemb: str = "learned",
        rep_size: int = 0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        drop_path_growth: str = "linear",
        layer_scale: float | None = None,
        gelu: str = "tanh",
        qkv_bias: bool = True,
        remat: str = "none",
        attention_block: int | None = None,
        softmax: str = "float32",
        form: str = "matrix",
        cls_token: bool | None = None,
        registers: int = 0,
        prefix_posemb: str = "cls",
        norm_epsilon: float = 1e-6,
        norm_after_pool: bool = False,
        channels: int = 3,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        # What get_config gives to .keras files, checkpoints and all that loads weights.
        self._config: dict[str, Any] = {
            "image_size": as_pair(image_size),
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "mlp_dim": mlp_dim,
            "num_heads": num_heads,
            "num_classes": num_classes,
            "pool": pool,
            "posemb": posemb,
            "rep_size": rep_size,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "drop_path": drop_path,
            "drop_path_growth": drop_path_growth,
            "layer_scale": layer_scale,
            "gelu": gelu,
            "qkv_bias": qkv_bias,
            "remat": remat,
            "attention_block": attention_block,
            "softmax": softmax,
            "form": form,
            # Resolved here, so that a stored config says what the network has.
            "cls_token": needs_cls(pool) if cls_token is None else cls_token,
            "registers": registers,
            "prefix_posemb": prefix_posemb,
            "norm_epsilon": norm_epsilon,
            "norm_after_pool": norm_after_pool,
            "channels": channels,
        }
        check_vit(**self._config)
        self.image_size: tuple[int, int] = self._config["image_size"]
        self.cls_token: bool = self._config["cls_token"]
        self.pool, self.posemb, self.width, self.depth = pool, posemb, width, depth
        self.num_classes, self.patch_size, self.channels = num_classes, patch_size, channels
        # Rows and columns of patches.
        self.grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        self.remat, self.norm_after_pool = remat, norm_after_pool
        self.registers_count = registers
        self.prefix = int(self.cls_token) + registers  # tokens before the patches
        # Tokens before the patches that have an entry in the learned table of positions. These
        # entries come first; one for each patch follows.
        entries = {"cls": int(self.cls_token), "all": self.prefix, "none": 0}
        self.posemb_prefix = entries[prefix_posemb]
        self._make_layers()

    def _make_layers(self) -> None:
        config, dtype = self._config, self.dtype_policy
        # What a block and the attention pooling have in common. Keras does not pass a model's
        # dtype policy on to its layers, so each is given it.
        shared = {k: config[k] for k in ("num_heads", "gelu", "norm_epsilon", "form")}
        shared |= {"hidden": config["mlp_dim"], "dtype": dtype}
        self.embedding = PatchEmbedding(
            self.width, (self.patch_size,) * 2, form=config["form"], name="embedding", dtype=dtype
        )
        self.drop = Dropout(config["dropout"], form=config["form"], name="dropout", dtype=dtype)
        self.blocks = [self._make_block(i, **shared) for i in range(self.depth)]
        # The last LayerNorm; `features` applies it before the pooling or after.
        self.norm = layer_norm(
            "encoder_norm", dtype, epsilon=config["norm_epsilon"], form=config["form"]
        )
        self.map_head = MapHead(**shared, name="map_head") if self.pool == "map" else None
        dense, rep_size = keras.layers.Dense, config["rep_size"]
        self.pre_logits = (
            dense(rep_size, activation="tanh", name="pre_logits", dtype=dtype) if rep_size else None
        )
        # Logits in float32 under every policy: the loss subtracts large numbers from each other,
        # and in 16 bits their difference would have few digits left.
        classes = self.num_classes
        self.head = dense(classes, name="head", dtype="float32") if classes else None

    def _make_block(self, index: int, **shared: Any) -> EncoderBlock:
        config = self._config
        # Stochastic depth drops later blocks more often: 0 at the first, the full rate at the last.
        linear = config["drop_path_growth"] == "linear"
        share = index / max(self.depth - 1, 1) if linear else 1.0
        # Arguments that a block calls as the model does.
        passed_on = ("qkv_bias", "dropout", "attention_dropout", "layer_scale", "softmax")
        return EncoderBlock(
            **shared,
            **{key: config[key] for key in passed_on},
            drop_path=config["drop_path"] * share,
            recompute_attention=self.remat in ("attention", "attention_mlp"),
            recompute_mlp=self.remat == "attention_mlp",
            attention_block=config["attention_block"],
            name=f"encoderblock_{index}",
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._config}

    def build(self, input_shape: Any = None) -> None:
        # All shapes are known from the arguments, so nothing waits for a first batch; layers are
        # built by hand, as Keras would trace `call` to find them.
        tokens = self.prefix + self.grid[0] * self.grid[1]
        shape = (None, tokens, self.width)
        self.embedding.build((None, *self.image_size, self.channels))
        if self.cls_token:
            self.cls = self.add_weight(name="cls", shape=(1, 1, self.width))
        if self.registers_count:
            self.registers = self.add_weight(
                name="registers", shape=(1, self.registers_count, self.width)
            )
        if self.posemb == "learned":
            # One for each patch, and for those tokens before the patches that have a position.
            entries = tokens - self.prefix + self.posemb_prefix
            self.pos_embedding = self.add_weight(
                name="pos_embedding", shape=(1, entries, self.width)
            )
        parts: list[Any] = [self.drop, *self.blocks, self.norm]
        for layer in parts:
            layer.build(shape)
        if self.map_head:
            # It sees the patches alone, as in big_vision and timm.
            self.map_head.build((None, tokens - self.prefix, self.width))
        # Width of what the head sees.
        features = 2 * self.width if self.pool == "tok_gap" else self.width
        if self.pre_logits:
            self.pre_logits.build((None, features))
            features = self.pre_logits.units
        if self.head:
            self.head.build((None, features))
        self.built = True

    def _embed(self, images: tf.Tensor, **mode: Any) -> tf.Tensor:
        """(B, height, width, C) -> (B, N, D): cls token, registers, patches; with positions."""
        x = self.embedding(images)
        # The tokens before the patches, (1, prefix, D): the same for each image, so their positions
        # are added before they are repeated B times.
        parts = [self.cls] if self.cls_token else []
        parts += [self.registers] if self.registers_count else []
        prefix = tf.concat([tf.cast(part, x.dtype) for part in parts], axis=1) if parts else None
        if self.posemb == "sincos2d":
            # A constant of the graph, and no variable: it is computed anew for every grid.
            x = x + tf.constant(sincos2d(self.grid, self.width), x.dtype)
        else:
            # The first `entries` rows are of tokens before the patches, the others of patches.
            table, entries = tf.cast(self.pos_embedding, x.dtype), self.posemb_prefix
            # Before tokens are put in front, so that entry i belongs to patch i.
            x = x + table[:, entries:]
            if entries:
                # Tokens before the patches that have no entry get a position of zeros.
                rest = ((0, 0), (0, self.prefix - entries), (0, 0))
                prefix = prefix + tf.pad(table[:, :entries], rest)
        if prefix is not None:
            # The same tokens for each example: their variables have a batch axis of 1.
            x = tf.concat([tf.tile(prefix, (tf.shape(x)[0], 1, 1)), x], axis=1)
        return self.drop(x, **mode)

    def patch_positions(self) -> np.ndarray:
        """The position embeddings of the patches alone: float32 (rows * columns, D)."""
        if self.posemb == "sincos2d":
            return sincos2d(self.grid, self.width)
        # Entries of tokens before the patches come first.
        return tf.convert_to_tensor(self.pos_embedding).numpy()[0, self.posemb_prefix :]

    def _pool(self, x: tf.Tensor) -> tf.Tensor:
        """(B, N, D) -> what the head sees: (B, D), (B, 2 D) for "tok_gap", (B, N, D) for "none"."""
        if self.pool in ("gap", "tok_gap"):
            # In float32: a sum over many tokens overflows float16 and loses digits in bfloat16.
            patches = tf.cast(x[:, self.prefix :], tf.float32)
            mean = tf.cast(tf.reduce_mean(patches, axis=1), x.dtype)
            return mean if self.pool == "gap" else tf.concat([x[:, 0], mean], axis=-1)
        if self.pool == "tok":
            return x[:, 0]
        return self.map_head(x[:, self.prefix :]) if self.map_head else x

    def features(self, images: tf.Tensor, training: bool = False, seed: tf.Tensor | None = None):
        """What the head sees of images; arguments as in `call`.

        Returns:
          (B, F), or (B, N, F) for pool "none", in the compute dtype; F is rep_size where there is a
          representation layer, else 2 D for pool "tok_gap" and D for the others.

        Raises:
          ConfigError: images of another size or number of channels than the model's.
        """
        # Static shapes: this runs while tracing, and costs a step nothing.
        if tuple(images.shape[1:]) != (*self.image_size, self.channels):
            raise ConfigError(
                f"this model takes images of {(*self.image_size, self.channels)}, "
                f"got {tuple(images.shape[1:])}"
            )
        mode = {"training": training, "seed": seed}
        x = self._embed(tf.cast(images, self.compute_dtype), **mode)
        for block in self.blocks:
            # Evaluation has no backward pass that could compute anything again.
            if training and self.remat == "full":
                # Keras tells type checkers nothing of a layer that is called.
                run = functools.partial(block, training=True)  # type: ignore[misc]
                x = rematerialized_layers(run, [block], x, seed=seed)
            else:
                x = block(x, **mode)
        return self.read_out(x)

    def read_out(self, x: tf.Tensor) -> tf.Tensor:
        """The last block's tokens (B, N, D) -> what the head sees of them; see `features`."""
        # The mean of normalised tokens is not the normalised mean, so this order changes logits.
        x = self.norm(self._pool(x)) if self.norm_after_pool else self._pool(self.norm(x))
        return self.pre_logits(x) if self.pre_logits else x

    def call(self, images: tf.Tensor, training: bool = False, seed: tf.Tensor | None = None):
        """Images to logits.

        Args:
          images: (B, height, width, channels), floating, scaled to [-1, 1] or by mean and std.
          training: whether dropout and stochastic depth act.
          seed: int32 (2,); required where they act. The same seed gives the same masks.

        Returns:
          float32 (B, C), (B, N, C) for pool "none"; without a head, the features.
        """
        x = self.features(images, training=training, seed=seed)
        return self.head(tf.cast(x, tf.float32)) if self.head else x

    def walk(self, images: tf.Tensor) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
        """Goes through the blocks in inference mode, one at a time; `call` spends nothing on it.

        Yields:
          For each block its output (B, N, D) and its attention weights (B, H, N, N), whose rows sum
          to 1.
        """
        x = self._embed(tf.cast(images, self.compute_dtype))
        for block in self.blocks:
            # Asked for its weights, a block takes the plain attention, not the blockwise one.
            x, weights = block(x, return_weights=True)
            yield x, weights

    def intermediates(self, images: tf.Tensor) -> dict[str, list[tf.Tensor]]:
        """What `walk` yields, all at once.

        Returns:
          "tokens": `depth` tensors (B, N, D), each block's output;
          "attention": `depth` tensors (B, H, N, N), rows sum to 1.
        """
        tokens, attention = zip(*self.walk(images), strict=True)
        return {"tokens": list(tokens), "attention": list(attention)}

    def pooling_weights(self, x: tf.Tensor) -> tf.Tensor:
        """The last block's tokens (B, N, D) -> pool "map"'s weights of the patches, (B, H, P).

        Raises:
          ConfigError: a model with another pool.
        """
        if self.map_head is None:
            raise ConfigError(f"pool {self.pool!r} has no weights of its own")
        # As in `read_out`: with norm_after_pool the tokens are pooled as they are.
        x = x if self.norm_after_pool else self.norm(x)
        _, weights = self.map_head(x[:, self.prefix :], return_weights=True)
        return weights[:, :, 0]  # the probe is the only query


def build_vit(
    config: dict[str, Any],
    *,
    seed: int = 0,
    precision: str = "float32",
    form: str = "matrix",
    head_bias: float = 0.0,
    posemb_stddev: float = 0.02,
) -> ViT:
    """Builds and initialises a ViT; call it under the strategy's scope.

    Args:
      config: what vit_config returned.
      seed: of the initial weights. A variable's draw depends on the seed and its name alone, so
        that other layers, or another order of making them, do not change it.
      precision: "float32", "bfloat16" or "float16" activations; variables are always float32.
      form: of ViT; choose_form says which fits a kind of device.
      head_bias: initial bias of the head (-10 or -6.9 for sigmoid losses over 21k or 1k classes).
      posemb_stddev: of a learned position table; 0.02 in vision_transformer, 1/sqrt(width) in
        big_vision.

    Raises:
      ConfigError: unknown precision, or a network that ViT refuses.
    """
    check_choice("precision", precision, tuple(PRECISIONS))
    # Its name begins the path of every variable; named_weights takes it off again.
    model = ViT(**{**config, "form": form}, dtype=PRECISIONS[precision], name="vit")
    model.build()
    initialize(model, seed=seed, head_bias=head_bias, posemb_stddev=posemb_stddev)
    return model


def initialize(model: ViT, *, seed: int, head_bias: float, posemb_stddev: float) -> None:
    """Gives every variable its initial value, that of vision_transformer where it has the layer.

    Args:
      model: built.
      seed, head_bias, posemb_stddev: see build_vit.
    """
    init = keras.initializers
    # (regex of the name, seed -> initializer). The first that matches counts, so special cases
    # stand before the general ones: LayerScale's gamma before gamma, the MLP's biases before bias.
    rules = (
        (r"layer_scale_\d/gamma$", None),  # keeps the constant it was made with
        (r"head/kernel$|cls$|beta$", lambda _: init.Zeros()),
        (r"^head/bias$", lambda _: init.Constant(head_bias)),
        (r"gamma$", lambda _: init.Ones()),
        (r"^embedding/kernel$|^pre_logits/kernel$", lambda s: init.LecunNormal(seed=s)),
        (r"^registers$", lambda s: init.RandomNormal(stddev=1e-6, seed=s)),  # as timm and DINOv2
        (r"pos_embedding$", lambda s: init.RandomNormal(stddev=posemb_stddev, seed=s)),
        (r"mlp/dense_\d/bias$", lambda s: init.RandomNormal(stddev=1e-6, seed=s)),
        (r"kernel$|probe$", lambda s: init.GlorotUniform(seed=s)),
        (r"bias$", lambda _: init.Zeros()),
    )
    for name, variable in named_weights(model).items():
        make = next(make for pattern, make in rules if re.search(pattern, name))
        if make is None:
            continue
        # A 31-bit seed of its own for each variable, from a hash that is the same in every process.
        draw = zlib.crc32(f"{seed}/{name}".encode()) & 0x7FFFFFFF
        with tf.device("CPU:0"):  # the same numbers whatever accelerator there is
            variable.assign(np.asarray(make(draw)(variable.shape)))


def named_weights(model: keras.Model) -> dict[str, keras.Variable]:
    """The model's variables by name, such as "encoderblock_0/attention/query/kernel"."""
    # A path begins with the name of the model, which files and configs shall not depend on.
    return {v.path.split("/", 1)[-1]: v for v in model.weights}


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the variables that build_vit would make, by name; touches no device."""
    # In a graph variables are only nodes, and nothing of this graph is ever run: so no device
    # starts.
    with tf.Graph().as_default():
        model = ViT(**config, name="vit")
        model.build()
    return {name: tuple(v.shape) for name, v in named_weights(model).items()}
