"""Ops that decode images: as a whole or, of a JPEG, only a window, at a fraction of the size."""

import functools
from collections.abc import Callable

import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data.ops import binary, bmp, gif, jpeg, orientation, png, webp
from vit_dist.data.ops.basic import (
    check_positive,
    decoded,
    on_image,
    parse_method,
    parse_size,
    resize_image,
)
from vit_dist.data.ops.pipe import Pipe, op, switch
from vit_dist.data.ops.windows import Windowed, cut, size_of

# Aspect ratios (width / height) of Inception's crop, as in GoogLeNet (arXiv 1409.4842, section 6).
ASPECT_RATIOS = (3 / 4, 4 / 3)
RATIOS = (1, 2, 4, 8)  # libjpeg decodes at 1 / each of these
GIF, WEBP, PNG = b"GIF8", b"RIFF", b"\x89PNG"  # how files begin

Color = tuple[int, int, int]


@op(windows=True)
def decode(exif=False, min_side=None, background=None):
    """Decodes JPEG, PNG, BMP, GIF or WebP bytes to (H, W, 3); grey is repeated.

    Of an animation it takes the first frame. An image that is an array already passes through,
    likewise with 3 channels.

    Args:
      exif: Whether to turn the image upright as its EXIF orientation says (JPEG, PNG, WebP); the
        reference systems do not.
      min_side: Decodes a JPEG at 1/2, 1/4 or 1/8 of its size, the least whose smaller side still
        has that many pixels; rounded up, as libjpeg does. Each pixel is then about the mean of the
        pixels that it stands for.
      background: What transparent images are laid over: a level in 0..255, or (red, green, blue).
        None takes their colour without alpha, as the reference systems do.
    """
    options = _check_decoding(exif=exif, min_side=min_side, background=background)

    def apply(image, seed):
        return decode_whole(image, **options) if image.dtype == tf.string else _three(image)

    return on_image(apply)


@op(windows=True)
def inception_crop(size, area_min=5, area_max=100, method="bilinear", antialias=False):
    """Cuts a random window, of `area_min` to `area_max` percent of the area, and resizes it.

    The aspect ratio is 3/4 to 4/3; `method` and `antialias` as in `resize`.
    """
    size, area, method = parse_size(size), _area_range(area_min, area_max), parse_method(method)

    def crop(image, seed):
        begin, extent = _crop_window(size_of(decoded(image)), area, seed)
        window = cut(image, begin, extent)
        window.set_shape((None, None, image.shape[-1]))
        return resize_image(window, size, method, antialias)

    return on_image(crop)


@op(windows=True)
def decode_jpeg_and_inception_crop(
    size,
    area_min=5,
    area_max=100,
    method="bilinear",
    antialias=False,
    dct_scaling=False,
    exif=False,
    background=None,
):
    """`decode|inception_crop(...)`, which decodes only the window of a JPEG.

    `dct_scaling` decodes it at 1/2, 1/4 or 1/8 of its size where it has 2, 4 or 8 times as many
    pixels as `size` in both directions: as fewer coefficients are transformed, each pixel is about
    the mean of the pixels that it stands for. The window is the same, but for half such a pixel.
    `exif` and `background` are those of `decode`; the window is drawn in the upright image.
    """
    size, area, method = parse_size(size), _area_range(area_min, area_max), parse_method(method)
    background = _check_decoding(exif=exif, background=background)["background"]

    def crop(image, seed):
        if image.dtype == tf.string:
            crop_file = _file_cropper(size, area, method, antialias, dct_scaling, exif, background)
            return crop_file(image, seed)
        # An array that a source or a cache has decoded already.
        cropped = _crop_and_resize(_three(image), area, seed, size, method, antialias)
        return tf.ensure_shape(cropped, (*size, 3))

    return on_image(crop)


def decode_whole(
    data: tf.Tensor,
    *,
    exif: bool = False,
    min_side: int | None = None,
    background: Color | None = None,
) -> tf.Tensor:
    """Returns the pixels, (H, W, 3) uint8, of an image file's bytes, () string.

    Every kind of JPEG, PNG, BMP, GIF and WebP comes out as Pillow's `convert("RGB")` has it, but
    for the rounding of JPEG decoders, and grey levels of 16 bits, of which the upper 8 are taken.

    Args:
      data: The file.
      exif: As of the op `decode`; so are `min_side` and `background`.

    Raises:
      InvalidArgumentError: It is no image, damaged, or a kind that is not read.
    """
    return _whole_decoder(exif, min_side, background)(data)


# Cached, as is each function below that makes functions: pipelines with the same ops share one, and
# only the first of them takes the time to trace it.
@functools.cache
def _whole_decoder(exif: bool, min_side: int | None, background: Color | None) -> Callable:
    """Returns a function of the bytes of any image file, () string -> (H, W, 3) uint8."""

    @binary.one_node(binary.COLORS, rare=False)
    def decode_any(data: tf.Tensor) -> tf.Tensor:
        return tf.cond(
            tf.io.is_jpeg(data),
            lambda: _decode_jpeg(data, exif, min_side),
            lambda: _decode_other(data, exif, background),
        )

    return decode_any


def decoding_of(pipe: Pipe) -> dict:
    """Returns how the pipe decodes whole images: keyword arguments of `decode_whole`.

    For a cache that keeps decoded images, and to know what the pipe leaves out.
    """
    for step in pipe.steps:
        if step.op.make in (decode, decode_jpeg_and_inception_crop):
            # Ops may lack an argument: only `decode` has min_side.
            given = {key: step.arguments.get(key) for key in ("exif", "min_side", "background")}
            return _check_decoding(**given)
    return {}


@functools.cache
def _file_cropper(
    size: tuple[int, int],
    area: tuple[float, float],
    method: str,
    antialias: bool,
    dct_scaling: bool,
    exif: bool,
    background: Color | None,
) -> Callable:
    """Returns a function of a file's bytes and a seed, (2,) int32 -> `size` + (3,) uint8."""

    def crop_jpeg(data, seed):
        # (height, width, channels) as stored, from the header: nothing is decoded yet.
        shape = tf.image.extract_jpeg_shape(data)
        way = orientation.of_jpeg(data) if exif else None
        data = jpeg.mark_inverted(data, shape[2])

        def decode_window(begin, extent):
            def at(ratio):
                window = _scaled_window(begin, extent, shape[:2], ratio)
                return tf.image.decode_and_crop_jpeg(data, window, channels=3, ratio=ratio)

            return _at_ratio(extent, size, at) if dct_scaling else at(1)

        def as_stored():
            begin, extent = (x[:2] for x in _crop_window(shape, area, seed))
            return decode_window(begin, extent)

        def turned():
            upright = tf.concat([orientation.swap_sides(way, shape[:2]), shape[2:]], axis=0)
            begin, extent = (x[:2] for x in _crop_window(upright, area, seed))
            stored = orientation.stored_window(way, begin, extent, upright[:2])
            return orientation.turn(decode_window(*stored), way)

        # Most are stored upright, and cost no more than without `exif`.
        image = as_stored() if way is None else tf.cond(way > 1, turned, as_stored)
        return resize_image(image, size, method, antialias)

    @binary.one_node(tf.TensorSpec((*size, 3), tf.uint8), tf.TensorSpec((2,), tf.int32), rare=False)
    def crop_file(data, seed):
        def crop_other():
            pixels = _decode_other(data, exif, background)
            return _crop_and_resize(pixels, area, seed, size, method, antialias)

        return tf.cond(tf.io.is_jpeg(data), lambda: crop_jpeg(data, seed), crop_other)

    return crop_file


def _crop_and_resize(image, area, seed, size, method: str, antialias: bool) -> tf.Tensor:
    begin, extent = _crop_window(size_of(image), area, seed)
    return resize_image(cut(image, begin, extent), size, method, antialias)


def _check_decoding(*, exif=False, min_side=None, background=None) -> dict:
    """Returns an op's arguments as `decode_whole` takes them; ValueError for one that is wrong."""
    if not isinstance(exif, bool):
        raise ConfigError(f"exif={exif!r} must be True or False")
    if min_side is not None:
        check_positive(min_side=min_side)
    if background is not None:
        color = background if isinstance(background, tuple) else (background,) * 3
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in color)
        if len(color) != 3 or not whole or not all(0 <= x <= 255 for x in color):
            raise ConfigError(
                f"background={background!r} must be an int in 0..255 or (red, green, blue)"
            )
        background = color
    return {"exif": exif, "min_side": min_side, "background": background}


def _decode_jpeg(data: tf.Tensor, exif: bool, min_side: int | None) -> tf.Tensor:
    shape = tf.image.extract_jpeg_shape(data)
    data = jpeg.mark_inverted(data, shape[2])

    def at(ratio):
        return tf.io.decode_jpeg(data, channels=3, ratio=ratio)

    pixels = at(1) if min_side is None else _at_ratio(shape[:2], (min_side, min_side), at)
    return orientation.turn(pixels, orientation.of_jpeg(data)) if exif else pixels


def _decode_other(data: tf.Tensor, exif: bool, background: Color | None) -> tf.Tensor:
    """Returns the pixels, (H, W, 3) uint8, of a file that is no JPEG."""
    begin = tf.strings.substr(data, 0, 4)
    is_bmp = tf.equal(tf.strings.substr(begin, 0, 2), b"BM")

    def plain() -> tf.Tensor:
        # A PNG; or bytes that are no image, which TensorFlow refuses with a message.
        return tf.io.decode_image(data, channels=3, expand_animations=False)

    if not exif and background is None:
        is_mended = is_bmp | tf.reduce_any(tf.equal(begin, (GIF, WEBP)))
        return tf.cond(is_mended, lambda: _decode_mended(data)[..., :3], plain)
    is_known = is_bmp | tf.reduce_any(tf.equal(begin, (GIF, WEBP, PNG)))
    return tf.cond(is_known, lambda: _decoder(exif, background)(data), plain)


@binary.one_node(binary.PIXELS)
def _decode_mended(data: tf.Tensor) -> tf.Tensor:
    """Returns (H, W, 4) uint8 of what TensorFlow alone does not read as it should."""
    matches = tf.equal(tf.strings.substr(data, 0, 4), (GIF, WEBP))
    number = tf.reduce_sum(tf.where(matches, (1, 2), 0))
    functions = (bmp.decode, gif.decode, webp.decode)
    return switch(number, [functools.partial(function, data) for function in functions])


@functools.cache
def _decoder(exif: bool, background: Color | None) -> Callable:
    """Returns a function of the bytes of a PNG, BMP, GIF or WebP, () string -> (H, W, 3) uint8."""

    @binary.one_node(binary.COLORS)
    def decode_other(data: tf.Tensor) -> tf.Tensor:
        pixels = tf.cond(
            binary.has(data, 0, PNG), lambda: png.decode(data), lambda: _decode_mended(data)
        )
        if exif:
            # After the pixels. TensorFlow gives up a call that stands beside one that fails, and
            # would now and then report that the first was cancelled, not what is wrong.
            with tf.control_dependencies([pixels]):
                way = orientation.of_other(tf.identity(data))
            pixels = orientation.turn(pixels, way)
        return _lay_over(pixels, background)

    return decode_other


def _lay_over(pixels: tf.Tensor, background: Color | None) -> tf.Tensor:
    """Returns (H, W, 3) uint8 of pixels with alpha, (H, W, 4) uint8, over a colour; None drops."""
    if background is None:
        return pixels[..., :3]
    # 255 * 255 + 128 fits 16 bits.
    own, alpha = (tf.cast(x, tf.uint16) for x in (pixels[..., :3], pixels[..., 3:]))
    mixed = own * alpha + tf.constant(background, tf.uint16) * (255 - alpha)
    # Divides by 255 and rounds without a division, as Pillow does: with y = x + 128, it is
    # (y + y / 256) / 256.
    mixed += 128
    mixed += tf.bitwise.right_shift(mixed, tf.constant(8, tf.uint16))
    return tf.cast(tf.bitwise.right_shift(mixed, tf.constant(8, tf.uint16)), tf.uint8)


def _three(image: tf.Tensor | Windowed) -> tf.Tensor | Windowed:
    """Returns an array of an image, grey repeated to 3 channels."""
    return tf.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def _crop_window(shape: tf.Tensor, area: tuple[float, float], seed: tf.Tensor):
    """Returns begin (3,) and extent (3,) int32 of a window as tf.slice takes them; depth is all."""
    # No bounding boxes are given, so that the whole image counts as the object, and no share of it
    # must be in the window: any place is allowed.
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
    # How many times `size` goes into the smaller direction.
    times = tf.reduce_min(shape // size)
    # How many of the ratios 2, 4, 8 are not too large: the place of the largest one in RATIOS.
    which = tf.reduce_sum(tf.cast(times >= RATIOS[1:], tf.int32))
    return switch(which, [lambda ratio=ratio: decode(ratio) for ratio in RATIOS])


def _scaled_window(begin, extent, shape, ratio: int) -> tf.Tensor:
    """Returns (top, left, height, width) in pixels of an image that is decoded at 1 / `ratio`."""
    if ratio > 1:
        # libjpeg rounds the size of a scaled image up. The window is rounded to the nearest pixel
        # and kept inside.
        shape = (shape + ratio - 1) // ratio
        extent = (extent + ratio // 2) // ratio
        begin = tf.minimum((begin + ratio // 2) // ratio, shape - extent)
    return tf.concat((begin, extent), 0)
