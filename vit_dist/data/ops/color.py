"""Colour operations on one image, (H, W, 3) uint8, for XLA on the host.

An operation that looks at one channel's value alone is a table of 256 entries, so that several in a
row become one look-up. Compilers may fuse a product and a sum into one instruction, which rounds
once instead of twice. All that is rounded here is therefore computed in integers, or in floating
point such that fusing changes nothing: results do not depend on the processor.

There are two sets of formulas, and arguments say which: Pillow's (ImageOps, ImageEnhance,
ImageFilter), and those of the TPU reference models' autoaugment.py, in float32 as TensorFlow
computes them there on x86 processors.
"""

import numpy as np
import tensorflow as tf

# Fixed point of `blend`: the largest factor, 7, times 255 still fits 31 bits. The bias makes up for
# the rounding of the factor, so that 1.9 * 10 is 19; both are far below the 1/100 of a level.
_BITS = 20
_BIAS = 1 << 8
MAX_FACTOR = 7.0

# Grey levels: Pillow's weights of red, green and blue (ITU-R 601-2) in 16 bits of fixed point, and
# the half that is added so that the shift rounds to the nearest.
_LUMA = (19595, 38470, 7471)
_HALF = 1 << 15
# What each value of each channel adds to the grey level in [0, 1] that tf.image.rgb_to_grayscale
# computes, (3, 256) float32: divided by 255, then times the channel's weight, each rounded.
_LUMA_PARTS = np.array([[0.2989], [0.5870], [0.1140]], np.float32) * (
    np.arange(256, dtype=np.float32) * np.float32(1 / 255)
)
_TO_UINT8 = 255.5  # tf.image.convert_image_dtype's factor from [0, 1]; it truncates afterwards

# The reference models' smoothing: weights of 1/13 in a square of 3 x 3, with 5/13 in the middle.
_SMOOTH, _SMOOTH_MIDDLE = np.float32(1) / np.float32(13), np.float32(5) / np.float32(13)


# Tables made of numbers are numpy arrays, which are constants to XLA; those made of tensors are
# tensors.
LEVELS: np.ndarray = np.arange(256, dtype=np.int32)


def invert() -> np.ndarray:
    """Returns the table of a negative."""
    return 255 - LEVELS


def solarize(threshold):
    """Returns the table that inverts the values from `threshold` (int) on."""
    return _where(threshold > LEVELS, LEVELS, 255 - LEVELS)


def solarize_add(addition):
    """Returns the table that adds `addition` (int of 0 or more) to the values below 128."""
    added = addition + LEVELS
    # 0 * added + 255 is 255 in the type of `added`, numpy array or tensor.
    return _where(LEVELS < 128, _where(added < 255, added, 0 * added + 255), LEVELS)


def posterize(bits):
    """Returns the table that keeps the `bits` (int, 0..8) highest bits; of 0, all is black."""
    # By the number of bits: 256, 128, ..., 1. Rounding down to a multiple clears the lower bits.
    steps: np.ndarray = 2 ** np.arange(8, -1, -1, dtype=np.int32)
    step = tf.gather(steps, bits) if isinstance(bits, tf.Tensor) else steps[bits]
    return LEVELS // step * step


def brightness(factor, *, reference: bool = False):
    """Returns the table that blends with black: 0 is black, 1 the image."""
    return contrast(factor, 0, reference=reference)


def contrast(factor, mean, *, reference: bool = False):
    """Returns the table that blends with the grey level `mean` (int): 0 is grey, 1 the image."""
    return blend_reference(mean, LEVELS, factor) if reference else blend(mean, LEVELS, factor)


def autocontrast(image: tf.Tensor, *, reference: bool) -> tf.Tensor:
    """Returns the (3, 256) table that stretches each channel to 0..255.

    `reference` computes in float32 as the reference models do, else float64 as Pillow does.
    """
    dtype = tf.float32 if reference else tf.float64
    # (3,) each: darkest and brightest level of each channel.
    low, high = (f(tf.cast(image, tf.int32), axis=(0, 1)) for f in (tf.reduce_min, tf.reduce_max))
    low_, high_ = tf.cast(low, dtype), tf.cast(high, dtype)
    scale = 255 / tf.maximum(high_ - low_, 1)
    offset = _product(-low_, scale)
    stretched = _product(tf.cast(LEVELS, dtype), scale[:, tf.newaxis]) + offset[:, tf.newaxis]
    # The cast truncates, as Pillow and the reference models do.
    stretched = tf.clip_by_value(tf.cast(stretched, tf.int32), 0, 255)
    # A channel of one level stays as it is.
    return tf.where((high > low)[:, tf.newaxis], stretched, LEVELS)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Returns the (3, 256) table that flattens each channel's histogram."""
    # One histogram for all: the levels of channel c are counted in bins 256 c to 256 c + 255.
    bins = tf.cast(image, tf.int32) + tf.constant([0, 256, 512])
    ones = tf.ones((image.shape.num_elements(),), tf.int32)
    histogram = tf.math.unsorted_segment_sum(ones, tf.reshape(bins, (-1,)), 768)
    histogram = tf.reshape(histogram, (3, 256))
    # Pillow leaves the count of the highest level that occurs out of the sum that it divides.
    highest = tf.reduce_max(tf.where(histogram > 0, LEVELS, -1), axis=1)
    last = tf.gather(histogram, highest, axis=1, batch_dims=1)[:, tf.newaxis]
    step = (image.shape[0] * image.shape[1] - last) // 255
    # Each level goes to the number of darker pixels, in steps, rounded.
    below = tf.cumsum(histogram, axis=1, exclusive=True)
    flat = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    # A channel with a single level, or with too few pixels for a step, stays as it is.
    return tf.where(step > 0, flat, LEVELS)


def apply_table(image: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
    """Returns the image seen through a table, (256,) or one for each channel (3, 256)."""
    at = tf.cast(image, tf.int32)
    if table.shape.rank == 2:
        # The three tables lie one behind the other.
        at += tf.constant([0, 256, 512])
    found = tf.gather(tf.reshape(tf.cast(table, tf.uint8), (-1,)), tf.reshape(at, (-1,)))
    return tf.reshape(found, image.shape)


def blend(first, second, factor) -> tf.Tensor:
    """Returns first + factor * (second - first), truncated and clipped to 0..255, as int32.

    Args:
      first: int32 in 0..255; also a number.
      second: int32 in 0..255.
      factor: In [0, MAX_FACTOR], a number or a scalar; beyond 1 it extrapolates.
    """
    if isinstance(factor, tf.Tensor):
        scale = tf.cast(tf.round(tf.cast(factor, tf.float32) * 2**_BITS), tf.int32)
    else:
        scale = np.int32(round(factor * 2**_BITS))
    # Fits 31 bits for every factor up to MAX_FACTOR; negative values are clipped below.
    mixed = first * (1 << _BITS) + scale * (second - first) + _BIAS
    if isinstance(mixed, tf.Tensor):
        return tf.clip_by_value(tf.bitwise.right_shift(mixed, _BITS), 0, 255)
    return np.clip(mixed >> _BITS, 0, 255)


def blend_reference(first, second, factor):
    """Returns what `blend` does with the reference models' rounding, as int32.

    They compute in float32: the product is rounded, then the sum, which is truncated and clipped.
    """
    if isinstance(first, tf.Tensor) or isinstance(second, tf.Tensor):
        difference = tf.cast(second - first, tf.float32)
        mixed = tf.cast(first, tf.float32) + _product(difference, tf.cast(factor, tf.float32))
        return tf.cast(tf.clip_by_value(mixed, 0.0, 255.0), tf.int32)
    difference = np.asarray(second - first, np.float32)
    mixed = np.float32(first) + np.float32(factor) * difference  # numpy fuses nothing
    return np.clip(mixed, 0, 255).astype(np.int32)


def luma(image: tf.Tensor, *, reference: bool) -> tf.Tensor:
    """Returns the image's grey levels, (H, W, 1) int32."""
    red, green, blue = tf.split(tf.cast(image, tf.int32), 3, axis=-1)
    if not reference:
        mixed = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + _HALF
        return tf.bitwise.right_shift(mixed, 16)
    # Looked up, as the products are known beforehand; only the sums are left to compute.
    parts = (tf.gather(part, at) for part, at in zip(_LUMA_PARTS, (red, green, blue), strict=True))
    of_red, of_green, of_blue = parts
    return tf.cast((of_red + of_green + of_blue) * _TO_UINT8, tf.int32)


def mean_luma(image: tf.Tensor) -> tf.Tensor:
    """Returns the mean grey level as Pillow rounds it, a scalar int32."""
    count = image.shape[0] * image.shape[1]
    # 64 bits, as twice the sum of a large image exceeds 31.
    total = tf.reduce_sum(tf.cast(luma(image, reference=False), tf.int64))
    # total / count + 1/2, rounded down, in whole numbers.
    return tf.cast((2 * total + count) // (2 * count), tf.int32)


def color(image: tf.Tensor, factor, *, reference: bool) -> tf.Tensor:
    """Returns the image blended with its grey levels: 0 is grey, 1 the image."""
    mix = blend_reference if reference else blend
    mixed = mix(luma(image, reference=reference), tf.cast(image, tf.int32), factor)
    return tf.cast(mixed, tf.uint8)


def sharpness(image: tf.Tensor, factor, *, reference: bool) -> tf.Tensor:
    """Returns the image blended with a smoothed one: 0 is smooth, 1 the image, 2 sharper.

    The smoothing is Pillow's SMOOTH, 3 x 3 with a weight of 5/13 in the middle, and leaves the
    border as it is. Pillow rounds it, the reference models truncate.
    """
    pixels = tf.cast(image, tf.int32)
    height, width, _ = image.shape
    # All pixels are border, which is left as it is.
    if min(height, width) < 3:
        return image
    smooth = _smooth_reference(pixels) if reference else _smooth(pixels)
    inner = (blend_reference if reference else blend)(smooth, pixels[1:-1, 1:-1], factor)
    inner = tf.pad(inner, ((1, 1), (1, 1), (0, 0)))
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    return tf.cast(tf.where(border[..., tf.newaxis], pixels, inner), tf.uint8)


def _smooth(pixels: tf.Tensor) -> tf.Tensor:
    """Returns the weighted means of 3 x 3 pixels, (H - 2, W - 2, 3) int32, rounded."""
    # The nine pixels with a weight of 1, and the middle four times more: 13 in all.
    rows = pixels[:-2] + pixels[1:-1] + pixels[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * pixels[1:-1, 1:-1]
    return (total + 6) // 13


def _smooth_reference(pixels: tf.Tensor) -> tf.Tensor:
    """Returns the weighted means of 3 x 3 pixels, (H - 2, W - 2, 3) int32, truncated.

    As TensorFlow's depthwise convolution sums on x86: row by row in float32, each product and each
    sum rounded. Where the exact mean is an integer, the sum is often a little less, and truncation
    makes one level less of it.
    """
    height, width, _ = pixels.shape
    values = tf.cast(pixels, tf.float32)
    edge, middle = (_product(values, tf.constant(w)) for w in (_SMOOTH, _SMOOTH_MIDDLE))
    total = tf.zeros((height - 2, width - 2, 3))
    for row, column in np.ndindex(3, 3):
        weighted = middle if row == column == 1 else edge
        total += weighted[row : row + height - 2, column : column + width - 2]
    return tf.cast(tf.clip_by_value(total, 0.0, 255.0), tf.int32)


def gaussian_blur(image: tf.Tensor, sigma: tf.Tensor, *, max_sigma: float) -> tf.Tensor:
    """Returns the image blurred as Pillow's GaussianBlur(sigma) does.

    That is three box filters along each axis, whose fractional radius gives the variance (Gwosdek
    et al., SSVM 2011), each in 24 bits of fixed point; borders are repeated.

    Args:
      image: (H, W, 3) uint8.
      sigma: () float32 in (0, max_sigma], in pixels.
      max_sigma: Static bound.
    """
    whole, rest = _box_radius(sigma)
    # Pixels on each side that the largest box touches: its whole radius (see _box_radius) and one
    # that is covered in part. Static, for the loop below.
    reach = int(((12 * max_sigma**2 / 3 + 1) ** 0.5 - 1) / 2) + 1
    # Weights in 2**-24: of a pixel that the box covers, and of the two that it covers in part,
    # which share what is left of 2**24.
    full = tf.cast(2**24 / (2 * (whole + rest) + 1), tf.uint32)
    taps = tf.cast(2 * whole + 1, tf.uint32)
    edge = (tf.constant(2**24, tf.uint32) - taps * full) // tf.constant(2, tf.uint32)

    def weight(k: int) -> tf.Tensor:
        zero = tf.zeros((), tf.uint32)
        k_ = float(abs(k))
        return tf.where(whole >= k_, full, tf.where(tf.equal(whole, k_ - 1), edge, zero))

    def box(rows: tf.Tensor) -> tf.Tensor:
        count = rows.shape[0]
        first, last = (tf.repeat(one, reach, axis=0) for one in (rows[:1], rows[-1:]))
        padded = tf.concat([first, rows, last], axis=0)
        # Half a unit, so that the shift rounds. Below 256 * 2**24, sums fit 32 bits.
        total = tf.constant(2**23, tf.uint32)
        for k in range(-reach, reach + 1):
            total += weight(k) * padded[reach + k : reach + k + count]
        return tf.bitwise.right_shift(total, tf.constant(24, tf.uint32))

    def along_rows(pixels: tf.Tensor) -> tf.Tensor:
        start = (tf.constant(0), pixels)  # a loop, although short: compiled once
        return tf.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, box(x)), start)[1]

    # Along x first, then along y, as Pillow: each pass rounds, so that the order matters.
    pixels = tf.transpose(tf.cast(image, tf.uint32), (1, 0, 2))
    pixels = tf.transpose(along_rows(pixels), (1, 0, 2))
    return tf.cast(along_rows(pixels), tf.uint8)


def _box_radius(sigma: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the whole and the fractional part of the radius of each of three boxes."""
    # The variances of the three boxes add up.
    variance = sigma * sigma / 3
    whole = tf.floor((tf.sqrt(12 * variance + 1) - 1) / 2)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole, rest / (6 * (variance - (whole + 1) * (whole + 1)))


def _where(condition, first, second):
    tensors = isinstance(condition, tf.Tensor) or isinstance(first, tf.Tensor)
    return tf.where(condition, first, second) if tensors else np.where(condition, first, second)


def _product(factor: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Returns factor * scale, rounded; `factor` holds integers of at most 8 bits and a sign.

    A compiler may fuse a product with the sum that it goes into, and so not round it. Here it is a
    sum already, of two products that are exact: `scale` is split into its higher bits (14 of
    float32's 24, 33 of float64's 53) and the lower ones, of which 8 bits more still fit.
    """
    integer, mask = (
        (tf.int32, ~((1 << 10) - 1)) if scale.dtype == tf.float32 else (tf.int64, ~((1 << 20) - 1))
    )
    high = tf.bitcast(tf.bitwise.bitwise_and(tf.bitcast(scale, integer), mask), scale.dtype)
    return factor * high + factor * (scale - high)
