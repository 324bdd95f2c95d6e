"""What the augmentation policies (RandAugment, AutoAugment, ...) share.

A policy lists all operations that it may draw, each as a `Layer`: a few numbers that say what to do
and how much. For each image it draws some of them (`pick`), and `augment` applies these in order.
An operation on single values is a look-up table of 256 entries. Tables in a row are composed first,
so that they cost one look-up together.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from vit_dist.data.ops import color, geometry
from vit_dist.data.tracing import switch

# What a layer does. It depends on the action which of the layer's other entries are used.
ACTIONS = (
    "table",  # looks each value up in the layer's table
    "warp",  # moves pixels by the layer's matrix
    "autocontrast",
    "equalize",
    "contrast",  # about the image's own mean
    "color",
    "sharpness",
    "cutout",
    "blur",
)
MAX_SIGMA = 2.0  # of blurs, in pixels


class Layer(NamedTuple):
    """One operation, of numpy arrays or tensors. With leading axes: several operations."""

    action: Any  # () int32, place in ACTIONS
    table: Any  # (256,) int32, of "table"
    matrix: Any  # (6,) float64, of "warp"; see `geometry`
    factor: Any  # () float32, of "contrast", "color" and "sharpness"; the sigma of "blur"


@dataclasses.dataclass(frozen=True)
class Style:
    """Which system's arithmetic to follow, and the settings that all layers of a policy share.

    Attributes:
      reference: Whether to follow the TPU reference models, rather than Pillow.
      fill: Colour of pixels that come in from outside of the image: a level, or three.
      taps: Filter of warps: 1 (nearest), 2 (bilinear), 4 (bicubic). The reference's is 1.
      cutout: Half the side of the square that "cutout" fills, in pixels.
    """

    reference: bool
    fill: int | tuple[int, int, int] = 128
    taps: int = 1
    cutout: int = 0


class _State(NamedTuple):
    """An image between two layers; the table is still to be applied to it."""

    image: tf.Tensor  # (H, W, 3) uint8
    table: tf.Tensor  # (3, 256) int32, one for each channel
    pending: tf.Tensor  # () int32: 0 no table waits, 1 one for all channels, 2 one for each


def layer(action: str, *, table=None, matrix=None, factor=1.0) -> Layer:
    """Returns a layer that does `action`; table, matrix and factor not given change nothing."""
    return Layer(
        action=np.int32(ACTIONS.index(action)),
        table=color.LEVELS if table is None else _int32(table),
        matrix=geometry.matrix(*geometry.IDENTITY) if matrix is None else matrix,
        factor=factor if isinstance(factor, tf.Tensor) else np.float32(factor),
    )


def nothing() -> Layer:
    """Returns the layer that leaves the image as it is."""
    return layer("table")


def pick(layers: Sequence[Layer], index: tf.Tensor) -> Layer:
    """Returns `layers[index]`, each entry with the axes of `index` (int32) in front."""
    # All layers are stacked entry by entry, so that one gather with a drawn number picks a layer.
    return Layer(*(tf.gather(_stack(entries), index) for entries in zip(*layers, strict=True)))


def keep_if(condition: tf.Tensor, chosen: Layer) -> Layer:
    """Returns `chosen` where `condition`, else `nothing()`."""
    # Not tf.where: a Layer has entries of different shapes.
    return pick([nothing(), chosen], tf.cast(condition, tf.int32))


def uniform(words: tf.Tensor) -> tf.Tensor:
    """Returns float32 in [0, 1) made of uint32: of their upper 24 bits, as float32 has no more."""
    return tf.cast(tf.bitwise.right_shift(words, tf.constant(8, tf.uint32)), tf.float32) * 2**-24


def below(words: tf.Tensor, count: int) -> tf.Tensor:
    """Returns int32 in 0..count-1 made of uint32; each is as likely but for count / 2**32."""
    return tf.cast(words % tf.constant(count, tf.uint32), tf.int32)


def draw(seed: tf.Tensor, shape: tuple[int, ...]) -> tf.Tensor:
    """Returns uniform uint32, a function of `seed` (2,) int32 alone.

    The algorithm is fixed because the default gives other numbers on other kinds of devices.
    """
    return tf.random.stateless_uniform(shape, seed, None, None, tf.uint32, alg="philox")


def augment(
    image: tf.Tensor,
    layers: Layer,
    style: Style,
    words: tf.Tensor | None = None,
    actions: Sequence[str] = ACTIONS[:-1],
) -> tf.Tensor:
    """Applies layers in order.

    Args:
      image: (H, W, 3) uint8, of a static shape.
      layers: What to do; each entry has a leading axis of n layers.
      style: Whose arithmetic, and colours and sizes.
      words: (n, 2) uint32, random: the middles of cutouts. None where none can occur.
      actions: The actions that can occur, by default all but "blur"; XLA compiles no others.

    Returns:
      The image after all layers, (H, W, 3) uint8.
    """
    count = layers.action.shape[0]
    words = tf.zeros((count, 2), tf.uint32) if words is None else words

    def step(i, *state):
        # i is a tensor, as this is traced once for all layers.
        one = Layer(*(entry[i] for entry in layers))
        return (i + 1, *_apply(_State(*state), one, style, words[i], actions))

    # A loop in the graph, although short: unrolled, XLA would compile all actions n times.
    start = _State(image, _untouched(), tf.constant(0))
    _, *state = tf.while_loop(lambda i, *_: i < count, step, (tf.constant(0), *start))
    return _flush(_State(*state))


def _apply(
    state: _State, one: Layer, style: Style, words: tf.Tensor, actions: Sequence[str]
) -> _State:
    """Applies one layer; a table is only composed with the one that waits already."""
    # A table only has to be composed with the one that waits; its look-up can wait as well. Any
    # other action needs pixels, so the table that waits is applied before it (_flush).
    on_table = tf.equal(one.action, ACTIONS.index("table"))
    # Once the channels have tables of their own (2), a further table cannot make them equal again.
    pending = tf.where(on_table, tf.maximum(state.pending, 1), 0)
    # Composed: level v becomes one.table[state.table[v]].
    table = tf.where(on_table, tf.gather(one.table, state.table), _untouched())
    # A pending of 0 makes _flush do nothing: before a table the image is left alone.
    image = _flush(state._replace(pending=tf.where(on_table, 0, state.pending)))
    reference = style.reference

    def changed(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[], _State]:
        """An action that makes other pixels."""
        return lambda: _State(function(image), table, pending)

    def seen_through(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[], _State]:
        """An action that makes tables of the image, which wait for the next layer."""
        return lambda: _State(image, function(image), tf.constant(2))

    # Only the branch of this layer's action runs; in XLA's compiled code branches cost nothing.
    branches = {
        "table": changed(tf.identity),
        "warp": changed(lambda x: _warp(x, one.matrix, style)),
        "autocontrast": seen_through(lambda x: color.autocontrast(x, reference=reference)),
        "equalize": seen_through(color.equalize),
        "contrast": seen_through(lambda x: _contrast(x, one.factor)),
        "color": changed(lambda x: color.color(x, one.factor, reference=reference)),
        "sharpness": changed(lambda x: color.sharpness(x, one.factor, reference=reference)),
        "cutout": changed(lambda x: _cutout(x, words, style)),
        "blur": changed(lambda x: color.gaussian_blur(x, one.factor, max_sigma=MAX_SIGMA)),
    }
    # From an action's number in ACTIONS to its number among those that can occur. The others are
    # never asked for, so any number (0) will do for them.
    place = np.array([actions.index(a) if a in actions else 0 for a in ACTIONS], np.int32)
    return _State(*switch(tf.gather(place, one.action), [branches[action] for action in actions]))


def _flush(state: _State) -> tf.Tensor:
    """Returns the image after the table that waits, if any."""
    return switch(
        state.pending,
        [
            lambda: state.image,
            # Pending 1: the three rows of the table are equal, so the first serves all channels.
            lambda: color.apply_table(state.image, state.table[0]),
            lambda: color.apply_table(state.image, state.table),
        ],
    )


def _untouched() -> tf.Tensor:
    # The table that maps each level to itself.
    return tf.broadcast_to(color.LEVELS, (3, 256))


def _int32(table):
    return tf.cast(table, tf.int32) if isinstance(table, tf.Tensor) else table.astype(np.int32)


def _stack(entries: Sequence):
    # Numbers that are known now are stacked now: one constant of the graph, and not an op that runs
    # for each image.
    tensors = any(isinstance(entry, tf.Tensor) for entry in entries)
    return tf.stack(entries) if tensors else np.stack(entries)


def _warp(image: tf.Tensor, matrix: tf.Tensor, style: Style) -> tf.Tensor:
    if style.reference:
        return geometry.warp_reference(image, matrix, style.fill)
    if style.taps == 1:
        return geometry.warp_nearest(image, matrix, style.fill)
    return geometry.warp_smooth(image, matrix, style.fill, style.taps)


def _contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    # Contrast looks at levels alone once the mean is known, so it is a table as well.
    table = color.contrast(factor, color.mean_luma(image))
    return tf.broadcast_to(table, (3, 256))


def _cutout(image: tf.Tensor, words: tf.Tensor, style: Style) -> tf.Tensor:
    """Fills a square about a uniformly drawn pixel; it may reach beyond the border."""
    height, width, _ = image.shape
    # Distances from the drawn middle, in pixels: (H, 1) and (W,).
    y = tf.range(height)[:, tf.newaxis] - below(words[0], height)
    x = tf.range(width) - below(words[1], width)
    half = style.cutout
    inside = (y >= -half) & (y < half) & (x >= -half) & (x < half)
    return tf.where(inside[..., tf.newaxis], tf.cast(style.fill, tf.uint8), image)
