"""Floating-point operations of a Vision Transformer for one image, layer by layer.

The one definition in this project: a matrix product of (n, k) by (k, m) is 2 n k m operations, a
multiplication and an addition for each term. Only matrix products count (the patch embedding is
one): biases, norms, softmax and GELU are 1 to 2 % more in the usual variants, and run on other
units of a device. What a backward pass computes *again* to save memory (model.remat,
model.attention_block) does not count either. So the numbers are the "model FLOPs" of PaLM (arXiv
2204.02311, appendix B), and

    MFU = model FLOPs per second / the device's peak.

Shapes: N tokens, P patches, D width, M hidden width of the MLP, C classes.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from vit_dist.model.variants import as_pair, needs_cls


class LayerFlops(NamedTuple):
    """The operations of one layer for one image.

    Attributes:
      name: of the layer, as its weights are called: "encoderblock_0/attention/query". The two
        products without weights are "encoderblock_0/attention/logits" and ".../attention/sum".
      forward: operations of the forward pass.
      backward: operations of the backward pass of a training step, 0 where it needs none.
    """

    name: str
    forward: int
    backward: int


# What `model.remat` computes again of each block, by the ends of layers' names. Of whole blocks the
# MLP's second product is left out: nothing in the backward pass asks for the block's output.
_WEIGHTS = ("attention/logits", "attention/sum")
_INSIDE = ("attention/query", "attention/key", "attention/value", "attention/out")
RECOMPUTED = {
    "none": (),
    "attention": _WEIGHTS,
    "attention_mlp": (*_WEIGHTS, "mlp/dense_0"),
    "full": (*_INSIDE, *_WEIGHTS, "mlp/dense_0"),
}


class Tokens(NamedTuple):
    """Vectors of an image that pass through the blocks: its patches, and all with the prefix."""

    patches: int
    all: int


def count_tokens(network: Mapping[str, Any]) -> Tokens:
    """The tokens of one image; `network` as for `layer_flops`."""
    (height, width), size = as_pair(network["image_size"]), network["patch_size"]
    patches = (height // size) * (width // size)
    has_cls = network.get("cls_token")
    cls = needs_cls(network["pool"]) if has_cls is None else has_cls
    return Tokens(patches, patches + int(cls) + network["registers"])


class _Counter:
    """Adds up layers in the order of the forward pass, with what the backward pass has to do."""

    def __init__(self, trained: Collection[str] | None):
        self._trained = trained
        self.layers: list[LayerFlops] = []

    def trains(self, *prefixes: str) -> bool:
        """Whether a weight whose name begins so is trained."""
        if self._trained is None:
            return True
        return any(name.startswith(prefix) for name in self._trained for prefix in prefixes)

    def dense(self, name: str, rows: int, width_in: int, width_out: int, *, needed: bool) -> bool:
        """A product of `rows` rows with a kernel.

        `needed` says whether something before it trains, so that its input needs a gradient.
        Returns the same of its output.
        """
        forward = 2 * rows * width_in * width_out
        # One product for the gradient of the kernel, and one for that of the input: each as large
        # as the forward product, and left out where nobody uses its result.
        products = int(self.trains(f"{name}/kernel")) + int(needed)
        self.layers.append(LayerFlops(name, forward, products * forward))
        return needed or self.trains(f"{name}/")

    def product(self, name: str, forward: int, *, left: bool, right: bool) -> bool:
        """A product of two activations, either of which may need a gradient."""
        self.layers.append(LayerFlops(name, forward, (int(left) + int(right)) * forward))
        return left or right

    def attention(
        self, name: str, queries: int, keys: int, width: int, *, needed: bool, context: bool
    ) -> bool:
        """Multi-head attention; `needed` is about the queries' input, `context` the keys'."""
        query = self.dense(f"{name}/query", queries, width, width, needed=needed)
        key = self.dense(f"{name}/key", keys, width, width, needed=context)
        value = self.dense(f"{name}/value", keys, width, width, needed=context)
        # H heads of width D / H: the number of heads cancels out.
        forward = 2 * queries * keys * width
        weights = self.product(f"{name}/logits", forward, left=query, right=key)
        summed = self.product(f"{name}/sum", forward, left=weights, right=value)
        return self.dense(f"{name}/out", queries, width, width, needed=summed)

    def mlp(self, name: str, rows: int, width: int, hidden: int, *, needed: bool) -> bool:
        """The two dense layers of a block."""
        needed = self.dense(f"{name}/dense_0", rows, width, hidden, needed=needed)
        return self.dense(f"{name}/dense_1", rows, hidden, width, needed=needed)


def layer_flops(
    network: Mapping[str, Any], *, trained: Collection[str] | None = None
) -> list[LayerFlops]:
    """The operations of every layer for one image, in the order of the forward pass.

    Args:
      network: arguments of ViT, as model.variants.vit_config returns them.
      trained: names of the weights that train; None for all of them. A frozen kernel needs no
        gradient, and what lies before the first weight that trains needs no backward pass.
    """
    counter = _Counter(trained)
    patches, tokens = count_tokens(network)
    size, width, hidden = network["patch_size"], network["width"], network["mlp_dim"]
    # Images are no variables: nothing asks for their gradient.
    needed = counter.dense(
        "embedding", patches, size * size * network["channels"], width, needed=False
    )
    needed = needed or counter.trains("cls", "registers", "pos_embedding")
    for i in range(network["depth"]):
        name = f"encoderblock_{i}"
        # The gradient of a block's input also comes by the residual branch, which costs nothing.
        inside = needed or counter.trains(f"{name}/norm_0/")
        after = counter.attention(
            f"{name}/attention", tokens, tokens, width, needed=inside, context=inside
        )
        needed = needed or after or counter.trains(f"{name}/layer_scale_0/", f"{name}/norm_1/")
        needed = counter.mlp(f"{name}/mlp", tokens, width, hidden, needed=needed)
        needed = needed or counter.trains(f"{name}/layer_scale_1/")
    # With norm_after_pool it comes behind a MapHead; a norm alone trains in neither place often
    # enough to count it apart.
    needed = needed or counter.trains("encoder_norm/")
    _head(counter, network, patches=patches, tokens=tokens, needed=needed)
    return counter.layers


def _head(
    counter: _Counter, network: Mapping[str, Any], *, patches: int, tokens: int, needed: bool
) -> None:
    """The pooling, the representation layer and the classifier."""
    width, pool = network["width"], network["pool"]
    if pool == "map":
        # One query for each image, the probe, whose input is trained where the probe is.
        probe = counter.trains("map_head/probe")
        needed = counter.attention(
            "map_head/attention", 1, patches, width, needed=probe, context=needed
        )
        needed = needed or counter.trains("map_head/norm/")
        needed = counter.mlp("map_head/mlp", 1, width, network["mlp_dim"], needed=needed)
    rows = tokens if pool == "none" else 1
    features = 2 * width if pool == "tok_gap" else width
    if network["rep_size"]:
        rep_size = network["rep_size"]
        needed = counter.dense("pre_logits", rows, features, rep_size, needed=needed)
        features = rep_size
    if network["num_classes"]:
        counter.dense("head", rows, features, network["num_classes"], needed=needed)


def train_flops(network: Mapping[str, Any], *, trained: Collection[str] | None = None) -> int:
    """Operations of a training step for each image of its batch; see `layer_flops`."""
    return sum(x.forward + x.backward for x in layer_flops(network, trained=trained))


def remat_flops(network: Mapping[str, Any], trained: Collection[str] | None) -> int:
    """Operations of a training step for each image, with what `remat` computes again."""
    layers, blocks = layer_flops(network, trained=trained), block_names(network)
    again = sum(
        layer.forward
        for layer in layers
        for block, _, part in [layer.name.partition("/")]
        if block in blocks and layer.backward and part in RECOMPUTED[network["remat"]]
    )
    return sum(x.forward + x.backward for x in layers) + again


def block_names(network: Mapping[str, Any]) -> set[str]:
    """What the layers of blocks are called, before the first slash."""
    return {f"encoderblock_{i}" for i in range(network["depth"])}


def eval_flops(network: Mapping[str, Any]) -> int:
    """Operations of a forward pass for each image; see `layer_flops`."""
    return sum(x.forward for x in layer_flops(network))
