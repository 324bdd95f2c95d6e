"""RandAugment (arXiv 1909.13719), as the TPU reference models and as timm have it.

"The reference" is big_vision's pp/autoaugment.py, which scenic and Model Garden share: its numbers
are restated here, its quirks included, as checkpoints were trained with them.
"""

import math
import re

import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data.ops import augment, color, geometry
from vit_dist.data.ops.augment import Layer, Style, layer
from vit_dist.data.ops.pipe import op

# In the order of big_vision, scenic and Model Garden; the first 15 but for Cutout are timm's.
REFERENCE_OPS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color"),
    *("Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
    *("Cutout", "SolarizeAdd"),
)
FORMS = ("reference", "fixed")
MAX_MAGNITUDE = 20  # of published recipes; from 22.5 on posterize would keep more than 8 bits
# At magnitude 10, whatever the image's size: half the side of a cutout, and a shift, in pixels.
CUTOUT, TRANSLATE = 40, 100


@op(compiled=True)
def randaug(n=2, m=10, form="reference"):
    """RandAugment: `n` of 16 operations of magnitude `m` (0..20), with replacement.

    form "reference" keeps the reference's quirks, "fixed" repairs three of them: solarize and
    posterize grow stronger with m, contrast is about the image's mean.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 16:
        raise ConfigError(f"n={n!r} must be an int in 1..16")
    if isinstance(m, bool) or not isinstance(m, (int, float)) or not 0 <= m <= MAX_MAGNITUDE:
        raise ConfigError(f"m={m!r} must be a number in 0..{MAX_MAGNITUDE}")
    if form not in FORMS:
        raise ConfigError(f"form={form!r} must be one of {FORMS}")
    # The reference fills with the grey level 128.
    style = Style(reference=True, fill=128, cutout=int(m / 10 * CUTOUT))

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        height, width, _ = image.shape
        # Each operation twice, once for each sign. Operations that have no sign are listed twice as
        # well, so that all are drawn equally often.
        choices = [
            reference_layer(name, m, sign, height, width, form)
            for name in REFERENCE_OPS
            for sign in (1, -1)
        ]
        # Four random words a layer: which operation, row and column of a cutout's middle, and one
        # that is not used.
        words = augment.draw(seed, (n, 4))
        layers = augment.pick(choices, augment.below(words[:, 0], len(choices)))
        return augment.augment(image, layers, style, words[:, 1:3])

    return apply


def reference_layer(
    name: str,
    level: float,
    sign: int,
    height: int,
    width: int,
    form: str = "reference",
    translate: float = TRANSLATE,
) -> Layer:
    """Returns one of REFERENCE_OPS.

    Args:
      name: Of the operation.
      level: Its magnitude, 0..20.
      sign: 1 or -1, the direction of a warp; other operations have none.
      height: Of the image, in pixels; so is `width`.
      width: See `height`.
      form: Of FORMS.
      translate: The shift of TranslateX and TranslateY at level 10, in pixels.
    """
    part = level / 10
    match name:
        # No magnitude: the image, or for a cutout the style, decides.
        case "AutoContrast" | "Equalize" | "Cutout":
            return layer(name.lower())
        case "Invert":
            return layer("table", table=color.invert())
        case "Posterize":
            bits = int(part * 4)
            # The reference keeps bits by shifts of 8 - bits, and TensorFlow shifts uint8 by 7 bits
            # at most: asked for 0 bits, it keeps the highest one.
            kept = max(bits, 1) if form == "reference" else 8 - bits
            return layer("table", table=color.posterize(kept))
        case "Solarize":
            threshold = int(part * 256)
            # The reference compares in uint8, where 256 becomes 0: at magnitude 10 all is inverted.
            threshold = threshold % 256 if form == "reference" else max(0, 256 - threshold)
            return layer("table", table=color.solarize(threshold))
        case "SolarizeAdd":
            return layer("table", table=color.solarize_add(int(part * 110)))
        case "Brightness":
            return layer("table", table=color.brightness(enhance(part), reference=True))
        case "Contrast":
            if form == "fixed":
                return layer("contrast", factor=enhance(part))
            # The reference means to take the mean level, but averages the histogram's 256 counts:
            # it gets the number of pixels / 256, whatever the image.
            mean = min(255, height * width // 256)
            return layer("table", table=color.contrast(enhance(part), mean, reference=True))
        case "Color" | "Sharpness":
            return layer(name.lower(), factor=enhance(part))
        case "Rotate":
            matrix = geometry.rotate_reference(part * 30 * sign, height, width)
        case "ShearX":
            matrix = geometry.shear_x(part * 0.3 * sign)
        case "ShearY":
            matrix = geometry.shear_y(part * 0.3 * sign)
        case "TranslateX":
            matrix = geometry.translate(part * translate * sign, 0)
        case "TranslateY":
            matrix = geometry.translate(0, part * translate * sign)
        case _:
            raise ConfigError(f"unknown operation {name!r}; known: {REFERENCE_OPS}")
    return layer("warp", matrix=matrix)


def enhance(part: float) -> float:
    """Returns the factor of a blend: 0.1 at magnitude 0, 1.9 at 10 and 3.7 at 20."""
    return part * 1.8 + 0.1


TIMM_OPS = tuple(name for name in REFERENCE_OPS if name != "Cutout")
# Pixels of the filter along each axis, as geometry.warp_smooth takes it.
TAPS = {"nearest": 1, "bilinear": 2, "bicubic": 4}
# round(255 * mean) of ImageNet, which timm fills with.
MEAN_COLOR = (124, 116, 104)


@op(compiled=True)
def rand_augment_timm(spec="rand-m9-mstd0.5-inc1", interpolation="bicubic"):
    """RandAugment as timm reads `spec`: n of 15 operations, each applied with probability p.

    Parts of `spec`, with their defaults: m, the magnitude (10); n (2); p (0.5); mstd, the standard
    deviation of the magnitude (0), or above 100 for one drawn uniformly from 0 to m; mmax, the
    largest (10); inc1, so that all operations grow stronger with m. `interpolation`, of warps, is
    nearest, bilinear or bicubic.
    """
    options = _parse_timm(spec)
    if interpolation not in TAPS:
        raise ConfigError(f"interpolation={interpolation!r} must be one of {tuple(TAPS)}")
    style = Style(reference=False, fill=MEAN_COLOR, taps=TAPS[interpolation])
    n, actions = options["n"], [a for a in augment.ACTIONS if a not in ("cutout", "blur")]

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        height, width, _ = image.shape

        def one(words: tf.Tensor) -> tuple:
            """One layer, from five words: operation, whether, two for the magnitude, sign."""
            level = _timm_level(words[2:4], options)
            sign = 1.0 - 2.0 * tf.cast(augment.below(words[4], 2), tf.float32)
            choices = [
                timm_layer(name, level, sign, height, width, options["inc"]) for name in TIMM_OPS
            ]
            chosen = augment.pick(choices, augment.below(words[0], len(choices)))
            return tuple(augment.keep_if(augment.uniform(words[1]) < options["p"], chosen))

        # The magnitude is drawn for each layer, so layers are made in the graph and not listed
        # before.
        entry_specs = tuple(tf.TensorSpec(entry.shape, entry.dtype) for entry in augment.nothing())
        drawn = tf.map_fn(one, augment.draw(seed, (n, 5)), fn_output_signature=entry_specs)
        layers = Layer(*drawn)
        return augment.augment(image, layers, style, actions=actions)

    return apply


def timm_layer(name: str, level, sign, height: int, width: int, inc: bool) -> Layer:
    """Returns one of TIMM_OPS at a level of 0..10 (more with mmax); `sign` is 1 or -1.

    Level and sign may be tensors. `inc` is for timm's "-inc" operations: posterize, solarize and
    the blends then grow stronger with the level. Without it posterize and solarize grow weaker, and
    a blend changes nothing (a factor of 1) at level 5.
    """
    part = level / 10.0
    factor = tf.maximum(0.1, 1 + part * 0.9 * sign) if inc else part * 1.8 + 0.1
    match name:
        case "AutoContrast" | "Equalize":
            return layer(name.lower())
        case "Invert":
            return layer("table", table=color.invert())
        case "Posterize":
            bits = tf.cast(part * 4, tf.int32)
            return layer(
                "table", table=color.posterize(tf.clip_by_value(4 - bits if inc else bits, 0, 8))
            )
        case "Solarize":
            threshold = tf.minimum(256, tf.cast(part * 256, tf.int32))
            return layer("table", table=color.solarize(256 - threshold if inc else threshold))
        case "SolarizeAdd":
            addition = tf.minimum(128, tf.cast(part * 110, tf.int32))
            return layer("table", table=color.solarize_add(addition))
        case "Brightness":
            return layer("table", table=color.brightness(factor))
        case "Contrast" | "Color" | "Sharpness":
            return layer(name.lower(), factor=factor)
        case "Rotate":
            matrix = geometry.rotate(part * 30 * sign, height, width)
        case "ShearX":
            matrix = geometry.shear_x(part * 0.3 * sign)
        case "ShearY":
            matrix = geometry.shear_y(part * 0.3 * sign)
        case "TranslateX":
            # A share of the side, where the reference has pixels.
            matrix = geometry.translate(part * 0.45 * sign * width, 0)
        case "TranslateY":
            matrix = geometry.translate(0, part * 0.45 * sign * height)
        case _:
            raise ConfigError(f"unknown operation {name!r}; known: {TIMM_OPS}")
    return layer("warp", matrix=matrix)


def _timm_level(words: tf.Tensor, options: dict) -> tf.Tensor:
    """Returns the magnitude of one layer, () float32."""
    first, second = tf.unstack(augment.uniform(words))
    if options["mstd"] > 100:
        # timm's way to ask for a uniform magnitude.
        level = first * options["m"]
    else:  # Box and Muller's normal variate, of two uniform ones; 1 - first is never 0
        normal = tf.sqrt(-2 * tf.math.log(1 - first)) * tf.cos(2 * math.pi * second)
        level = options["m"] + options["mstd"] * normal
    return tf.clip_by_value(level, 0.0, options["mmax"])


def _parse_timm(spec: str) -> dict:
    """Returns the parts of "rand-m9-mstd0.5-inc1" by name; ValueError for another form."""
    head, *parts = spec.split("-") if isinstance(spec, str) else ("",)
    # timm's defaults.
    options = {"m": 10.0, "n": 2, "p": 0.5, "mstd": 0.0, "mmax": 10.0, "inc": False}
    known = "m, n, p, mstd, mmax, inc, as in 'rand-m9-mstd0.5-inc1'"
    if head != "rand":
        raise ConfigError(f"spec={spec!r} must begin with 'rand'; its parts: {known}")
    for part in parts:
        # fullmatch tries the names in order and goes back: "mstd0.5" is no "m".
        match = re.fullmatch(r"(m|n|p|mstd|mmax|inc)(\d+(?:\.\d*)?)", part)
        if match is None:
            raise ConfigError(f"spec={spec!r}: {part!r} is no part; parts: {known}")
        key, value = match[1], float(match[2])
        # As in timm, "inc0" is set too: not the digit counts but that it is there.
        options[key] = int(value) if key == "n" else True if key == "inc" else value
    if not 1 <= options["n"] <= 16 or options["p"] > 1 or not 0 < options["mmax"] <= 20:
        raise ConfigError(f"spec={spec!r}: need n in 1..16, p in 0..1, mmax in 1..20")
    return options
