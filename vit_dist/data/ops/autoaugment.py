"""AutoAugment, TrivialAugment, 3-Augment and the single colour augmentations.

Each is a policy as `augment` describes it: it lists all layers that it may apply, and draws the
numbers of those that it does.
"""

import itertools

import numpy as np
import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data.ops import augment, color, geometry
from vit_dist.data.ops.augment import Layer, Style, layer
from vit_dist.data.ops.pipe import op
from vit_dist.data.ops.randaug import reference_layer

# The 25 sub-policies of the TPU reference models ("v0"): (operation, probability, level), twice.
POLICY_V0 = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)
# The reference models shift further here than in RandAugment.
AUTOAUGMENT_TRANSLATE = 250  # pixels at level 10

# torchvision's operations, in its order.
TRIVIAL_OPS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness"),
    *("Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
TRIVIAL_BINS = 31
# The six orders of color_jitter's three operations.
ORDERS = np.array(list(itertools.permutations(range(3))), np.int32)


@op(compiled=True)
def autoaugment(policy="v0"):
    """AutoAugment for ImageNet (arXiv 1805.09501): one of 25 pairs, as the reference models' v0."""
    if policy != "v0":
        raise ConfigError(f"policy={policy!r} must be 'v0'")
    # (25, 2): each operation of a pair is applied or not by a chance of its own.
    chances = np.array([[p for _, p, _ in pair] for pair in POLICY_V0], np.float32)
    levels = [(name, level) for pair in POLICY_V0 for name, _, level in pair]
    actions = ("table", "warp", "autocontrast", "equalize", "color")

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        height, width, _ = image.shape
        choices = [
            # Made while tracing, as shifts and rotations depend on the image's size.
            reference_layer(name, level, sign, height, width, translate=AUTOAUGMENT_TRANSLATE)
            for name, level in levels
            for sign in (1, -1)
        ]
        words = augment.draw(seed, (5,))  # which pair; whether, of each; sign, of each
        pair = augment.below(words[0], len(POLICY_V0))
        applied = augment.uniform(words[1:3]) < tf.gather(chances, pair)
        # Four neighbouring choices belong to a pair: its first operation with both signs, then its
        # second. Behind all choices is one that does nothing, for operations that are not applied.
        at = 4 * pair + tf.constant([0, 2]) + augment.below(words[3:5], 2)
        chosen = augment.pick([*choices, augment.nothing()], tf.where(applied, at, len(choices)))
        return augment.augment(image, chosen, Style(reference=True), actions=actions)

    return apply


@op(compiled=True)
def trivial_augment():
    """TrivialAugment Wide (arXiv 2103.10158): one of 14 operations at one of 31 strengths."""
    style = Style(reference=False, fill=0)
    actions = [a for a in augment.ACTIONS if a not in ("cutout", "blur")]

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        height, width, _ = image.shape
        choices = [
            trivial_layer(name, bin_, sign, height, width)
            for name in TRIVIAL_OPS
            for bin_ in range(TRIVIAL_BINS)
            for sign in (1, -1)
        ]
        # The numbers of one image: operation, strength, sign.
        words = augment.draw(seed, (3,))
        name, bin_, sign = (
            augment.below(words[i], count) for i, count in enumerate((14, TRIVIAL_BINS, 2))
        )
        # Places among the choices count signs fastest, then strengths, then operations.
        chosen = augment.pick(choices, ((name * TRIVIAL_BINS + bin_) * 2 + sign)[tf.newaxis])
        return augment.augment(image, chosen, style, actions=actions)

    return apply


def trivial_layer(name: str, bin_: int, sign: int, height: int, width: int) -> Layer:
    """Returns one of TRIVIAL_OPS at strength `bin_`, 0..30, with the numbers of torchvision.

    `sign`, 1 or -1, is the direction of warps, and whether factors are above or below 1.
    """
    # Strengths are evenly spaced, from 0 to each operation's largest: torchvision's linspace.
    part = bin_ / (TRIVIAL_BINS - 1)
    match name:
        case "Identity":
            return augment.nothing()
        case "AutoContrast" | "Equalize":
            return layer(name.lower())
        case "Posterize":
            # 8 bits, which change nothing, down to 2.
            return layer("table", table=color.posterize(8 - round(part * 6)))
        case "Solarize":
            # From 255 in 30 steps down to 0, where all is inverted.
            return layer("table", table=color.solarize(255 - 8.5 * bin_))
        case "Brightness":
            return layer("table", table=color.brightness(1 + 0.99 * part * sign))
        case "Color" | "Contrast" | "Sharpness":
            return layer(name.lower(), factor=1 + 0.99 * part * sign)
        case "ShearX":
            matrix = geometry.shear_x(0.99 * part * sign)
        case "ShearY":
            matrix = geometry.shear_y(0.99 * part * sign)
        case "TranslateX":
            # Up to 32 pixels. Negative: the image moves by so much, and the matrix leads back from
            # an output pixel to the input.
            matrix = geometry.translate(-int(32 * part * sign), 0)
        case "TranslateY":
            matrix = geometry.translate(0, -int(32 * part * sign))
        case "Rotate":
            matrix = geometry.rotate(135 * part * sign, height, width)
        case _:
            raise ConfigError(f"unknown operation {name!r}; known: {TRIVIAL_OPS}")
    return layer("warp", matrix=matrix)


@op(compiled=True)
def three_augment():
    """3-Augment of DeiT III (arXiv 2204.07118): grey, solarized from 128 on, or blurred.

    The blur's sigma is 0.1 to 2 pixels. DeiT III puts color_jitter(0.3, 0.3, 0.3) behind it.
    """

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        words = augment.draw(seed, (2,))
        choices = [
            # A factor of 0 takes nothing of the image: its grey levels remain.
            layer("color", factor=0.0),
            layer("table", table=color.solarize(128)),
            layer("blur", factor=_between(words[1], 0.1, 2.0)),
        ]
        chosen = augment.pick(choices, augment.below(words[:1], 3))
        return augment.augment(image, chosen, _PILLOW, actions=("table", "color", "blur"))

    return apply


@op(compiled=True)
def color_jitter(brightness=0.4, contrast=0.4, saturation=0.4):
    """Brightness, contrast and saturation by factors of 1 - x to 1 + x, in random order."""
    strengths = (brightness, contrast, saturation)
    for value in strengths:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 5:
            raise ConfigError(f"strengths must be numbers in 0..5, not {strengths}")

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        # The order of the three, and a factor for each.
        words = augment.draw(seed, (4,))
        factors = [
            _between(words[i + 1], max(0.0, 1 - x), 1.0 + x) for i, x in enumerate(strengths)
        ]
        choices = [
            layer("table", table=color.brightness(factors[0])),
            layer("contrast", factor=factors[1]),
            layer("color", factor=factors[2]),
        ]
        # One of the six orders, e.g. (2, 0, 1): three layers, applied in that order.
        chosen = augment.pick(choices, tf.gather(ORDERS, augment.below(words[0], len(ORDERS))))
        return augment.augment(image, chosen, _PILLOW, actions=("table", "contrast", "color"))

    return apply


@op(compiled=True)
def greyscale(p=0.2):
    """Takes the colour away, with probability `p`."""
    _check_chance(p)
    return _sometimes(p, "color", lambda word: layer("color", factor=0.0))


@op(compiled=True)
def solarize(threshold=128, p=0.2):
    """Inverts the values from `threshold` on, with probability `p`."""
    _check_chance(p)
    if isinstance(threshold, bool) or not isinstance(threshold, int) or not 0 <= threshold <= 256:
        raise ConfigError(f"threshold={threshold!r} must be an int in 0..256")
    return _sometimes(p, "table", lambda word: layer("table", table=color.solarize(threshold)))


@op(compiled=True)
def gaussian_blur(sigma_min=0.1, sigma_max=2.0, p=0.5):
    """Blurs as Pillow does, with a sigma drawn uniformly, in pixels, and probability `p`."""
    _check_chance(p)
    if not 0 < sigma_min <= sigma_max <= augment.MAX_SIGMA:
        raise ConfigError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}: need 0 < min <= max <= "
            f"{augment.MAX_SIGMA}"
        )
    return _sometimes(
        p, "blur", lambda word: layer("blur", factor=_between(word, sigma_min, sigma_max))
    )


# Levels and rounding as torchvision and timm have them, which call Pillow.
_PILLOW = Style(reference=False)


def _sometimes(p: float, action: str, make):
    """Returns an op that applies the layer `make(word)`, which does `action`, with chance `p`."""

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        words = augment.draw(seed, (2,))
        # nothing() is a table, so "table" always can occur; dict.fromkeys drops it if given twice.
        chosen = augment.pick([augment.nothing(), make(words[1])], _coin(words[:1], p))
        return augment.augment(
            image, chosen, _PILLOW, actions=tuple(dict.fromkeys(("table", action)))
        )

    return apply


def _coin(words: tf.Tensor, p: float) -> tf.Tensor:
    return tf.cast(augment.uniform(words) < p, tf.int32)


def _between(word: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return low + augment.uniform(word) * (high - low)


def _check_chance(p: float) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ConfigError(f"p={p!r} must be a number in 0..1")
