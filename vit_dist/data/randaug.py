"""RandAugment (arXiv 1909.13719), as the TPU reference models and as timm have it."""

import tensorflow as tf

from vit_dist.data import augment, color, geometry
from vit_dist.data.augment import Layer, Style, layer
from vit_dist.data.pipe import op

# In the order of big_vision, scenic and Model Garden; the first 15 but for Cutout are timm's.
REFERENCE_OPS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color"),
    *("Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
    *("Cutout", "SolarizeAdd"),
)
FORMS = ("reference", "fixed")
MAX_MAGNITUDE = 20  # of the published recipes; posterize would shift by more than 8 bits beyond 20
CUTOUT, TRANSLATE = 40, 100  # pixels at magnitude 10, whatever the image's size


@op(compiled=True)
def randaug(n=2, m=10, form="reference"):
    """RandAugment: `n` of 16 operations of magnitude `m` (0..20), with replacement.

    form "reference" keeps the reference's quirks, "fixed" repairs three: solarize and posterize
    grow with m, contrast is about the image's mean.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 16:
        raise ValueError(f"n={n!r} must be an int in 1..16")
    if isinstance(m, bool) or not isinstance(m, (int, float)) or not 0 <= m <= MAX_MAGNITUDE:
        raise ValueError(f"m={m!r} must be a number in 0..{MAX_MAGNITUDE}")
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {FORMS}")
    style = Style(reference=True, fill=128, cutout=int(m / 10 * CUTOUT))

    def apply(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        height, width, _ = image.shape
        choices = [
            reference_layer(name, m, sign, height, width, form)
            for name in REFERENCE_OPS
            for sign in (1, -1)
        ]
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
    """Returns one of REFERENCE_OPS at a level of 0..20, of which `sign` (1, -1) turns warps."""
    part = level / 10
    match name:
        case "AutoContrast" | "Equalize" | "Cutout":
            return layer(name.lower())
        case "Invert":
            return layer("table", table=color.invert())
        case "Posterize":
            bits = int(part * 4)
            return layer("table", table=color.posterize(bits if form == "reference" else 8 - bits))
        case "Solarize":
            threshold = int(part * 256)
            # The reference compares in uint8, where 256 is 0.
            threshold = threshold % 256 if form == "reference" else max(0, 256 - threshold)
            return layer("table", table=color.solarize(threshold))
        case "SolarizeAdd":
            return layer("table", table=color.solarize_add(int(part * 110)))
        case "Brightness":
            return layer("table", table=color.brightness(enhance(part)))
        case "Contrast":
            if form == "fixed":
                return layer("contrast", factor=enhance(part))
            # The reference sums a histogram's counts, not the levels they belong to.
            mean = min(255, height * width // 256)
            return layer("table", table=color.contrast(enhance(part), mean))
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
            raise ValueError(f"unknown operation {name!r}; known: {REFERENCE_OPS}")
    return layer("warp", matrix=matrix)


def enhance(part: float) -> float:
    """Returns the factor of a blend: 0.1 to 1.9, and 3.7 at magnitude 20."""
    return part * 1.8 + 0.1
