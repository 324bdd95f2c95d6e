"""Affine warps of one image, (H, W, 3) uint8, for XLA on the host.

A matrix is (6,) float64, a to f: the output pixel at column x and row y shows the input at column
a x + b y + c and row d x + e y + f. Where that lies outside of the input, it has the colour `fill`.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
# Added before truncating, so that 99.99999 is 100: far below a grey level, and more than the sum of
# 16 weighted values in float32 loses by rounding.
_BIAS = 1e-3


def matrix(*entries):
    """Returns six numbers as a matrix; a tensor if one is a scalar tensor."""
    if any(isinstance(entry, tf.Tensor) for entry in entries):
        return tf.stack([tf.cast(entry, tf.float64) for entry in entries])
    return np.array(entries, np.float64)


def shear_x(level):
    """Returns the matrix that shifts row y by `level` times y pixels."""
    return matrix(1, level, 0, 0, 1, 0)


def shear_y(level):
    """Returns the matrix that shifts column x by `level` times x pixels."""
    return matrix(1, 0, 0, level, 1, 0)


def translate(x, y):
    """Returns the matrix whose output at (0, 0) shows the input at (x, y)."""
    return matrix(1, 0, x, 0, 1, y)


def rotate(degrees, height: int, width: int):
    """Returns Pillow's rotation, anticlockwise about (width / 2, height / 2)."""
    if isinstance(degrees, tf.Tensor):
        radians = tf.cast(degrees, tf.float64) * (-math.pi / 180)
        cos, sin = tf.cos(radians), tf.sin(radians)
    else:
        cos, sin = math.cos(math.radians(-degrees)), math.sin(math.radians(-degrees))
    # Moves the centre to the origin, turns, and moves it back: c and f hold both moves.
    x, y = width / 2, height / 2
    return matrix(cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def rotate_reference(degrees: float, height: int, width: int):
    """Returns the rotation of TensorFlow Addons, about the middle of the pixels, in float32."""
    # Each operation rounds to float32, as in TensorFlow Addons, so that the same pixels come out.
    one = np.float32
    radians = one(degrees) * one(math.pi / 180)
    cos, sin, w, h = np.cos(radians), np.sin(radians), one(width - 1), one(height - 1)
    x = (w - (cos * w - sin * h)) / one(2)
    y = (h - (sin * w + cos * h)) / one(2)
    return matrix(cos, -sin, x, sin, cos, y)


def warp_reference(image: tf.Tensor, transform: tf.Tensor, fill) -> tf.Tensor:
    """Warps to the nearest pixel as ImageProjectiveTransformV3 does, to the bit."""
    height, width, _ = image.shape
    a, b, c, d, e, f = tf.unstack(tf.cast(transform, tf.float32))

    def source(along_x, along_y, offset):
        """The column (or row) shown at each output pixel, (H, W) int32."""
        # Each product is rounded before the sum, as TensorFlow's kernel does it on x86. A compiler
        # could fuse both and round once; half a pixel's border would fall elsewhere.
        x = _rounded_product(along_x, width)[tf.newaxis]
        y = _rounded_product(along_y, height)[:, tf.newaxis]
        value = x + y + offset
        whole = tf.cast(value, tf.int32)  # rounds halves away from zero, as C++ does
        rest = value - tf.cast(whole, tf.float32)
        return whole + tf.cast(rest >= 0.5, tf.int32) - tf.cast(rest <= -0.5, tf.int32)

    return _take(image, transform, lambda: (source(a, b, c), source(d, e, f)), fill)


def warp_nearest(image: tf.Tensor, transform: tf.Tensor, fill) -> tf.Tensor:
    """Warps to the nearest pixel as Pillow does, in 16 bits of fixed point."""
    height, width, _ = image.shape
    a, b, c, d, e, f = tf.unstack(transform)
    x, y = tf.range(width)[tf.newaxis], tf.range(height)[:, tf.newaxis]

    def fixed(value):
        """In units of 1 / 65536 pixel."""
        # Rounds to the nearest, halves up.
        return tf.cast(tf.floor(value * 65536 + 0.5), tf.int32)

    def source(along_x, along_y, offset):
        # From the middle of the first pixel on.
        start = fixed(offset + along_x * 0.5 + along_y * 0.5)
        return tf.bitwise.right_shift(start + fixed(along_x) * x + fixed(along_y) * y, 16)

    return _take(image, transform, lambda: (source(a, b, c), source(d, e, f)), fill)


def warp_smooth(image: tf.Tensor, transform: tf.Tensor, fill, taps: int) -> tf.Tensor:
    """Warps as Pillow does, bilinearly (`taps` is 2) or bicubically (4), and truncates.

    Each output pixel is a weighted sum of taps x taps input pixels; in place of pixels beyond the
    border, the border's are taken.
    """
    height, width, _ = image.shape
    a, b, c, d, e, f = tf.unstack(transform)
    x = tf.range(width, dtype=tf.float64)[tf.newaxis] + 0.5
    y = tf.range(height, dtype=tf.float64)[:, tf.newaxis] + 0.5
    source_x, source_y = a * x + b * y + c, d * x + e * y + f
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    # Middles of pixels lie at halves: the pixel whose middle is next on the left, or above, and how
    # far behind that middle the place is.
    left, top = tf.floor(source_x - 0.5), tf.floor(source_y - 0.5)
    rest_x = tf.cast(source_x - 0.5 - left, tf.float32)
    rest_y = tf.cast(source_y - 0.5 - top, tf.float32)
    left, top = tf.cast(left, tf.int32), tf.cast(top, tf.int32)
    pixels = tf.reshape(image, (-1, 3))
    weight = _cubic if taps == 4 else _linear

    def add(tap, total):
        # Taps are numbered row by row; i and j, columns and rows from `left` and `top`, are 0 and 1
        # of two taps, -1 to 2 of four.
        i, j = tap % taps - (taps // 2 - 1), tap // taps - (taps // 2 - 1)
        weights = weight(rest_x - tf.cast(i, tf.float32)) * weight(rest_y - tf.cast(j, tf.float32))
        column = tf.clip_by_value(left + i, 0, width - 1)
        row = tf.clip_by_value(top + j, 0, height - 1)
        found = tf.gather(pixels, tf.reshape(row * width + column, (-1,)))
        found = tf.cast(tf.reshape(found, image.shape), tf.float32)
        return tap + 1, total + weights[..., tf.newaxis] * found

    start = (tf.constant(0), tf.zeros(image.shape, tf.float32))
    _, total = tf.while_loop(lambda tap, _: tap < taps * taps, add, start)
    # A bicubic kernel has negative weights and so can leave 0..255.
    warped = tf.cast(tf.clip_by_value(total + _BIAS, 0, 255), tf.uint8)
    return tf.where(inside[..., tf.newaxis], warped, tf.cast(fill, tf.uint8))


def _take(image: tf.Tensor, transform: tf.Tensor, source: Callable, fill) -> tf.Tensor:
    """Returns the pixels at `source()`: columns and rows, each (H, W) int32."""
    height, width, _ = image.shape

    def index():
        """Places in the list of pixels, whose last one is the fill."""
        column, row = source()
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        return tf.reshape(tf.where(inside, row * width + column, height * width), (-1,))

    # The branch is there for XLA, not for the identity: it cannot fuse what is computed in a branch
    # with the gather below, and so does not compute each place again for each channel.
    unchanged = tf.reduce_all(tf.equal(transform, tf.constant(IDENTITY, tf.float64)))
    at = tf.cond(unchanged, lambda: tf.range(height * width), index)
    outside = tf.broadcast_to(tf.cast(fill, tf.uint8), (1, 3))
    pixels = tf.concat([tf.reshape(image, (-1, 3)), outside], axis=0)
    return tf.reshape(tf.gather(pixels, at), image.shape)


def _rounded_product(factor: tf.Tensor, count: int) -> tf.Tensor:
    """Returns factor * range(count), (count,) float32: exact in float64, then rounded once."""
    return tf.cast(tf.range(count, dtype=tf.float64) * tf.cast(factor, tf.float64), tf.float32)


def _linear(distance: tf.Tensor) -> tf.Tensor:
    return tf.maximum(0.0, 1 - tf.abs(distance))


def _cubic(distance: tf.Tensor) -> tf.Tensor:
    """The cubic convolution kernel with a = -1, as Pillow's transforms (its resize has -0.5)."""
    t = tf.abs(distance)
    near = (t - 2) * t * t + 1
    far = ((5 - t) * t - 8) * t + 4
    return tf.where(t < 1, near, tf.where(t < 2, far, 0.0))
