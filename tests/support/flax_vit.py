"""vision_transformer's and big_vision's ViT restated in NumPy; their .npz files in every layout.

A tree is a flat dict under big_vision's names; nothing here uses the package's tables.
"""

import math

import ml_dtypes
import numpy as np

WIDTH, HEADS, DEPTH, HIDDEN, PATCH, CLASSES = 12, 3, 2, 20, 4, 5
GRID = 3
IMAGE = GRID * PATCH


def make_tree(*, cls=False, map_head=False, rep=False, head=True, positions=GRID**2):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    tree = {
        "embedding/kernel": draw(PATCH, PATCH, 3, WIDTH),
        "embedding/bias": draw(WIDTH),
        "Transformer/encoder_norm/scale": 1 + draw(WIDTH),
        "Transformer/encoder_norm/bias": draw(WIDTH),
    }
    if positions:
        tree["pos_embedding"] = draw(1, positions, WIDTH)
    if cls:
        tree["cls"] = draw(1, 1, WIDTH)
    for i in range(DEPTH):
        tree |= _block(f"Transformer/encoderblock_{i}", draw)
        tree[f"Transformer/encoderblock_{i}/LayerNorm_0/scale"] = 1 + draw(WIDTH)
        tree[f"Transformer/encoderblock_{i}/LayerNorm_0/bias"] = draw(WIDTH)
        tree[f"Transformer/encoderblock_{i}/LayerNorm_1/scale"] = 1 + draw(WIDTH)
        tree[f"Transformer/encoderblock_{i}/LayerNorm_1/bias"] = draw(WIDTH)
    if map_head:
        tree |= _block("MAPHead_0", draw)
        tree["MAPHead_0/probe"] = draw(1, 1, WIDTH)
        tree["MAPHead_0/LayerNorm_0/scale"] = 1 + draw(WIDTH)
        tree["MAPHead_0/LayerNorm_0/bias"] = draw(WIDTH)
    if rep:
        tree |= {"pre_logits/kernel": draw(WIDTH, 8), "pre_logits/bias": draw(8)}
    if head:
        tree |= {"head/kernel": draw(8 if rep else WIDTH, CLASSES), "head/bias": draw(CLASSES)}
    return tree


def _block(name, draw):
    attention, mlp = f"{name}/MultiHeadDotProductAttention_0", f"{name}/MlpBlock_0"
    tree = {}
    for part in ("query", "key", "value"):
        tree[f"{attention}/{part}/kernel"] = draw(WIDTH, HEADS, WIDTH // HEADS)
        tree[f"{attention}/{part}/bias"] = draw(HEADS, WIDTH // HEADS)
    tree[f"{attention}/out/kernel"] = draw(HEADS, WIDTH // HEADS, WIDTH)
    tree[f"{attention}/out/bias"] = draw(WIDTH)
    return tree | {
        f"{mlp}/Dense_0/kernel": draw(WIDTH, HIDDEN),
        f"{mlp}/Dense_0/bias": draw(HIDDEN),
        f"{mlp}/Dense_1/kernel": draw(HIDDEN, WIDTH),
        f"{mlp}/Dense_1/bias": draw(WIDTH),
    }


def forward(tree, images, *, cls_in_table=False):
    """Logits (or features without a head), in float64; pooling as the tree's names have it."""
    t = {name: array.astype(np.float64) for name, array in tree.items()}
    b, size = images.shape[:2]
    grid = size // PATCH
    x = images.astype(np.float64).reshape(b, grid, PATCH, grid, PATCH, 3)
    x = np.einsum("bipjqc,pqcd->bijd", x, t["embedding/kernel"]) + t["embedding/bias"]
    x = x.reshape(b, grid * grid, WIDTH)
    table = t.get("pos_embedding", _sincos(grid) if "pos_embedding" not in t else None)
    if cls_in_table:
        x = np.concatenate([np.repeat(t["cls"], b, 0), x], 1) + table
    else:
        x = x + table
        if "cls" in t:
            x = np.concatenate([np.repeat(t["cls"], b, 0), x], 1)
    for i in range(DEPTH):
        name = f"Transformer/encoderblock_{i}"
        y = _norm(t, f"{name}/LayerNorm_0", x)
        x = x + _attention(t, f"{name}/MultiHeadDotProductAttention_0", y, y)
        x = x + _mlp(t, f"{name}/MlpBlock_0", _norm(t, f"{name}/LayerNorm_1", x))
    x = _norm(t, "Transformer/encoder_norm", x)
    if "MAPHead_0/probe" in t:
        probe = np.repeat(t["MAPHead_0/probe"], b, 0)
        y = _attention(t, "MAPHead_0/MultiHeadDotProductAttention_0", probe, x)
        x = (y + _mlp(t, "MAPHead_0/MlpBlock_0", _norm(t, "MAPHead_0/LayerNorm_0", y)))[:, 0]
    else:
        x = x[:, 0] if "cls" in t else x.mean(1)
    if "pre_logits/kernel" in t:
        x = np.tanh(x @ t["pre_logits/kernel"] + t["pre_logits/bias"])
    return x @ t["head/kernel"] + t["head/bias"] if "head/kernel" in t else x


def _sincos(grid):
    y, x = np.mgrid[:grid, :grid]
    omega = 10_000.0 ** -(np.arange(WIDTH // 4) / (WIDTH // 4 - 1))
    y, x = np.outer(y.ravel(), omega), np.outer(x.ravel(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1)[None]


def _norm(t, name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * t[f"{name}/scale"] + t[f"{name}/bias"]


def _attention(t, name, x, context):
    def project(part, z):
        return np.einsum("bnd,dhk->bnhk", z, t[f"{name}/{part}/kernel"]) + t[f"{name}/{part}/bias"]

    query, key, value = project("query", x), project("key", context), project("value", context)
    weights = np.einsum("bnhk,bmhk->bhnm", query, key) / math.sqrt(WIDTH // HEADS)
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhnm,bmhk->bnhk", weights, value)
    return np.einsum("bnhk,hkd->bnd", y, t[f"{name}/out/kernel"]) + t[f"{name}/out/bias"]


def _mlp(t, name, x):
    x = x @ t[f"{name}/Dense_0/kernel"] + t[f"{name}/Dense_0/bias"]
    x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # flax's gelu
    return x @ t[f"{name}/Dense_1/kernel"] + t[f"{name}/Dense_1/bias"]


# Layouts: the tree's names -> a file's.


def published(tree):
    """vision_transformer's files: numbers of before Linen, positions in a module of their own."""
    old = {
        "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
        "LayerNorm_1": "LayerNorm_2",
        "MlpBlock_0": "MlpBlock_3",
    }
    found = {}
    for name, array in linen(tree).items():
        parts = name.split("/")
        found["/".join([*parts[:-3], *(old.get(p, p) for p in parts[-3:])])] = array
    return found


def linen(tree):
    moved = {"pos_embedding": "Transformer/posembed_input/pos_embedding"}
    return {moved.get(name, name): array for name, array in tree.items()}


def before_2022(tree):
    moved = {"pos_embedding": "Transformer/pos_embedding"}
    return {f"params/{moved.get(name, name)}": array for name, array in tree.items()}


def big_vision(tree):
    return {f"params/{name}": array for name, array in tree.items()}


def optimizer(tree):
    state = {f"opt/state/param_states/{n}/momentum": a for n, a in published(tree).items()}
    state["opt/state/step"] = np.array(7)
    return {f"opt/target/{n}": a for n, a in published(tree).items()} | state


def two_towers(tree):
    text = {"params/txt/Embed_0/embedding": np.ones((4, 3), "f"), "params/t": np.ones(1, "f")}
    return {f"params/img/{n}": a for n, a in tree.items()} | text | {"params/b": np.ones(1, "f")}


def scanned(tree):
    """Blocks stacked along a leading axis, as nn.scan leaves them."""
    found, first = {}, "Transformer/encoderblock_0/"
    for name, array in tree.items():
        if name.startswith(first):
            parts = [tree[name.replace("_0/", f"_{i}/", 1)] for i in range(DEPTH)]
            found[f"params/Transformer/encoderblock/{name.removeprefix(first)}"] = np.stack(parts)
        elif not name.startswith("Transformer/encoderblock_"):
            found[f"params/{name}"] = array
    return found


def inlined_map(tree):
    return {f"params/{name.removeprefix('MAPHead_0/')}": array for name, array in tree.items()}


def bfloat16(tree):
    """As NumPy stores what it does not know: two raw bytes."""
    return {n: a.astype(ml_dtypes.bfloat16).view("V2") for n, a in big_vision(tree).items()}
