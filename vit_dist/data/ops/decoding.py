"""Ops that decode: whole images or, of a JPEG, a window at a fraction of its size."""

import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data.ops import orientation
from vit_dist.data.ops.basic import (
    check_positive,
    decoded,
    on_image,
    parse_method,
    parse_size,
    resize_image,
)
from vit_dist.data.ops.pipe import op, switch

# Aspect ratios (width / height) of Inception's crop, as in GoogLeNet (arXiv 1409.4842, section 6).
ASPECT_RATIOS = (3 / 4, 4 / 3)
RATIOS = (1, 2, 4, 8)  # libjpeg decodes at 1 / each of these


@op
def decode(exif=False, min_side=None):
    """Decodes JPEG, PNG, BMP, GIF (its first frame) or WebP bytes to (H, W, 3); grey is repeated.

    `exif` turns a JPEG upright as its EXIF orientation says; the reference systems do not. An image
    that is an array already passes through, likewise with 3 channels. `min_side` decodes a JPEG at
    1/2, 1/4 or 1/8 of its size, the least whose smaller side still has that many pixels; rounded
    up, as libjpeg does. Each pixel is then about the mean of those that it stands for.
    """
    if min_side is not None:
        check_positive(min_side=min_side)

    def scaled(data):
        shape = tf.image.extract_jpeg_shape(data)[:2]
        return _at_ratio(
            shape, (min_side,) * 2, lambda ratio: tf.io.decode_jpeg(data, channels=3, ratio=ratio)
        )

    def apply(image, seed):
        if image.dtype != tf.string:
            return _decode(image)
        pixels = (
            tf.cond(tf.io.is_jpeg(image), lambda: scaled(image), lambda: _decode(image))
            if min_side
            else _decode(image)
        )
        return orientation.turn(pixels, image) if exif else pixels

    return on_image(apply)


@op
def inception_crop(size, area_min=5, area_max=100, method="bilinear", antialias=False):
    """Cuts a random window, of `area_min` to `area_max` percent of the area, and resizes it.

    The aspect ratio is 3/4 to 4/3; `method` and `antialias` as in `resize`.
    """
    size, area, method = parse_size(size), _area_range(area_min, area_max), parse_method(method)

    def crop(image, seed):
        begin, extent = _crop_window(tf.shape(decoded(image)), area, seed)
        window = tf.slice(image, begin, extent)
        window.set_shape((None, None, image.shape[-1]))
        return resize_image(window, size, method, antialias)

    return on_image(crop)


@op
def decode_jpeg_and_inception_crop(
    size, area_min=5, area_max=100, method="bilinear", antialias=False, dct_scaling=False
):
    """`decode|inception_crop(...)`, which decodes only the window of a JPEG.

    `dct_scaling` decodes it at 1/2, 1/4 or 1/8 of its size where it has 2, 4 or 8 times as many
    pixels as `size` in both directions: as fewer coefficients are transformed, each pixel is about
    the mean of those that it stands for. The window is the same, but for half such a pixel.
    """
    size, area, method = parse_size(size), _area_range(area_min, area_max), parse_method(method)

    def crop_jpeg(data, seed):
        shape = tf.image.extract_jpeg_shape(data)
        begin, extent = (x[:2] for x in _crop_window(shape, area, seed))

        def at(ratio):
            window = _scaled_window(begin, extent, shape[:2], ratio)
            return tf.image.decode_and_crop_jpeg(data, window, channels=3, ratio=ratio)

        image = _at_ratio(extent, size, at) if dct_scaling else at(1)
        return resize_image(image, size, method, antialias)

    def crop_decoded(image, seed):
        image = _decode(image)
        begin, extent = _crop_window(tf.shape(image), area, seed)
        return resize_image(tf.slice(image, begin, extent), size, method, antialias)

    def crop(image, seed):
        if image.dtype != tf.string:
            return tf.ensure_shape(crop_decoded(image, seed), (*size, 3))
        result = tf.cond(
            tf.io.is_jpeg(image),
            lambda: crop_jpeg(image, seed),
            lambda: crop_decoded(image, seed),
        )
        return tf.ensure_shape(result, (*size, 3))

    return on_image(crop)


def _decode(image: tf.Tensor) -> tf.Tensor:
    if image.dtype == tf.string:
        return tf.io.decode_image(image, channels=3, expand_animations=False)
    return tf.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def _crop_window(shape: tf.Tensor, area: tuple[float, float], seed: tf.Tensor):
    """Returns begin (3,) and extent (3,) int32 of a window as tf.slice takes them; depth is all."""
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros((0, 0, 4), tf.float32),
        seed,
        min_object_covered=0,
        aspect_ratio_range=ASPECT_RATIOS,
        area_range=area,
        use_image_if_no_bounding_boxes=True,
    )
    return begin, extent


def _area_range(area_min: float, area_max: float) -> tuple[float, float]:
    if not 0 < area_min <= area_max <= 100:
        raise ConfigError(f"area_min={area_min}, area_max={area_max}: need 0 < min <= max <= 100")
    return area_min / 100, area_max / 100


def _at_ratio(shape, size, decode):
    """Returns `decode(r)` for the largest r of RATIOS with `shape` at least r times `size`."""
    times = tf.reduce_min(shape // size)
    which = tf.reduce_sum(tf.cast(times >= RATIOS[1:], tf.int32))
    return switch(which, [lambda ratio=ratio: decode(ratio) for ratio in RATIOS])


def _scaled_window(begin, extent, shape, ratio: int) -> tf.Tensor:
    """Returns (top, left, height, width) in pixels of an image that is decoded at 1 / `ratio`."""
    if ratio > 1:
        shape = (shape + ratio - 1) // ratio  # as libjpeg rounds
        extent = (extent + ratio // 2) // ratio
        begin = tf.minimum((begin + ratio // 2) // ratio, shape - extent)
    return tf.concat((begin, extent), 0)
