"""BMP files: palettes, and colours that lie in a pixel's bits where masks say.

TensorFlow's own decoder takes the numbers of a palette for grey levels, ignores compression, and
refuses 1, 4 and 16 bits a pixel and any byte after the pixels. Layout: [MS-WMF] 2.2.2 and Windows'
documentation of BITMAPINFOHEADER; what those leave open is as in Pillow (BmpImagePlugin.py).
"""

from typing import NamedTuple

import tensorflow as tf

from vit_dist.data.ops import binary

FILE_HEADER = 14  # bytes before the image's own header
OS2_HEADER = 12  # bytes of the oldest kind of header, whose numbers are shorter
HEADERS = (OS2_HEADER, 40, 52, 56, 64, 108, 124)
RAW, RLE8, RLE4, MASKS, ALPHA_MASKS = 0, 1, 2, 3, 6  # the header's "compression"
# What is read: pairs of compression and bits a pixel. 4 and 5 are a JPEG or PNG inside of a BMP.
KINDS = (
    *((RAW, bits) for bits in (1, 2, 4, 8, 16, 24, 32)),
    *((masks, bits) for masks in (MASKS, ALPHA_MASKS) for bits in (16, 24, 32)),
)
# Which bits are red, green, blue, alpha: of 16 without compression, and where all masks are 0 (as
# Pillow reads that).
RAW_MASKS = (0x7C00, 0x03E0, 0x001F, 0)
BYTE_MASKS = (0xFF0000, 0x00FF00, 0x0000FF, 0xFF000000)
# Where the numbers stand, in words of 2 bytes from the third byte of the file on: lower and upper
# word of start, size, width, height, bits, compression, colours, and of the four masks.
_NONE = 34  # one word behind the header's, which is 0
_WORDS = (
    *((4, 5), (6, 7), (8, 9), (10, 11), (13, _NONE), (14, 15), (22, 23)),
    *((26, 27), (28, 29), (30, 31), (32, 33)),
)
_OS2_WORDS = (
    *((4, 5), (6, 7), (8, _NONE), (9, _NONE), (11, _NONE)),
    *[(_NONE, _NONE)] * 6,
)
# Colours of a palette, by bits a pixel.
_COLORS = [1 << bits if bits in (1, 2, 4, 8) else 0 for bits in range(33)]
_UNKNOWN = (
    "a BMP that is not read (header of {} bytes, {} bits a pixel, compression {}, {} x {} pixels): "
    "open it in an image program and save it as PNG"
)
_RUNS = (
    "a BMP compressed by run lengths (RLE), which is not read: open it in an image program and "
    "save it as PNG"
)
_CUT = "a BMP that is cut off: {} bytes are missing"


class _Header(NamedTuple):
    """What comes before the pixels; () int32 each, but for the last two."""

    width: tf.Tensor
    height: tf.Tensor  # negative where the first row that is stored is the top one
    stride: tf.Tensor  # bytes of a stored row, a multiple of 4
    bits: tf.Tensor  # of a pixel
    compression: tf.Tensor
    start: tf.Tensor  # where the pixels begin
    palette: tf.Tensor  # (n, 3) uint8; n is 0 where there is none
    masks: tf.Tensor  # (4,) int64


@binary.one_node(binary.PIXELS)
def decode(data: tf.Tensor) -> tf.Tensor:
    """Returns the pixels, (H, W, 4) uint8, of a BMP's bytes; alpha is 255 where there is none.

    Raises:
      InvalidArgumentError: The file is cut off, or of a kind that is not read; says which.
    """
    header = _read_header(data)
    height, bits = tf.abs(header.height), header.bits
    stored = binary.read(binary.within(data, header.start), header.start, height * header.stride)
    row = (header.width * bits + 7) // 8  # bytes with pixels: those behind fill the row up
    rows = tf.reshape(stored, (height, header.stride))[:, :row]
    columns = row * 8 // bits  # up to 7 pixels more than there are, where several share a byte

    # Three ways to store a pixel. Each gets all rows or none, and what comes out is joined: a
    # branch for each would be a function each, which costs every pipeline more than these nodes.
    whole_bytes = tf.equal(header.compression, RAW) & (bits >= 24)
    way = tf.where(bits <= 8, 0, tf.where(whole_bytes, 1, 2))
    counts = tf.one_hot(way, 3, on_value=height, off_value=0)
    in_palette, in_bytes, in_masks = tf.split(rows, counts, num=3)
    numbers = tf.reshape(_small_numbers(in_palette, bits), (-1, columns))
    # Of 3 bytes blue comes first; a fourth one means nothing. Where no row is here, there may be
    # fewer than 3 bytes.
    colors = tf.reshape(in_bytes, (-1, columns, tf.maximum(bits // 8, 3)))[..., 2::-1]
    colors = tf.concat([tf.gather(header.palette, numbers), colors], axis=0)
    opaque = tf.pad(colors, ((0, 0), (0, 0), (0, 1)), constant_values=tf.constant(255, tf.uint8))
    whole = _large_numbers(tf.reshape(in_masks, (-1, columns, (bits + 7) // 8)))
    pixels = tf.concat([opaque, _masked(whole, header.masks)], axis=0)[:, : header.width]
    return tf.raw_ops.Reverse(tensor=pixels, dims=tf.stack([header.height > 0, False, False]))


def _read_header(data: tf.Tensor) -> _Header:
    """Returns the header; where it is not sound, what needs it fails with a message."""
    words = tf.pad(tf.cast(binary.numbers(data, 2, _NONE, tf.uint16), tf.uint16), [[0, 1]])
    is_os2 = tf.equal(words[6], OS2_HEADER)
    # (numbers, lower and upper word) -> int32.
    fields = tf.bitcast(tf.gather(words, tf.where(is_os2, _OS2_WORDS, _WORDS)), tf.int32)
    fields = _check_kind(fields)
    start, size, width, height, bits, compression, colors, *masks = tf.unstack(fields)
    stride = (width * bits + 31) // 32 * 4
    missing = start + stride * tf.abs(height) - tf.strings.length(data)
    start = binary.require(start, missing <= 0, _CUT, missing)

    most = tf.gather(_COLORS, bits)
    colors = tf.where((colors > 0) & (colors <= most), colors, most)
    entry = tf.where(is_os2, 3, 4)
    end = FILE_HEADER + size
    palette = binary.read(binary.within(data, end), end, colors * entry)
    palette = tf.reshape(palette, (colors, entry))
    # Some writers forget the palette when they say where the pixels begin.
    start += tf.where(tf.equal(start, end), entry * colors, 0)
    # Headers of 40 and 52 bytes have no alpha, but by a kind of compression of its own.
    has_alpha = (size >= 56) | tf.equal(compression, ALPHA_MASKS)
    masks[3] = tf.where(has_alpha, masks[3], 0)
    masks = tf.cast(tf.bitcast(masks, tf.uint32), tf.int64)
    masks = tf.where(tf.reduce_max(masks) > 0, masks, BYTE_MASKS)
    return _Header(
        width=width,
        height=height,
        stride=stride,
        bits=bits,
        compression=compression,
        start=start,
        # Blue comes first; a fourth byte means nothing.
        palette=palette[:, 2::-1],
        masks=tf.where(tf.equal(compression, RAW), tf.constant(RAW_MASKS, tf.int64), masks),
    )


def _check_kind(fields: tf.Tensor) -> tf.Tensor:
    """Returns a header's numbers, (11,) int32, for what may be computed only where it is sound."""
    _, size, width, height, bits, compression, *_ = tf.unstack(fields)
    runs = tf.equal(compression, RLE8) | tf.equal(compression, RLE4)
    fields = binary.require(fields, ~runs, _RUNS)
    height = tf.abs(height)
    known = [
        tf.reduce_any(tf.reduce_all(tf.equal([compression, bits], KINDS), axis=1)),
        tf.reduce_any(tf.equal(size, HEADERS)),
        width > 0,
        height > 0,
        # Not their product, which may exceed 31 bits.
        width <= binary.MAX_PIXELS // tf.maximum(height, 1),
    ]
    values = size, bits, compression, width, height
    return binary.require(fields, tf.reduce_all(known), _UNKNOWN, *values)


def _small_numbers(rows: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Returns (H, bytes, pixels of a byte) int32, in 0..2 ** bits - 1, of bytes (H, bytes)."""
    # The first pixel is in the highest bits. Of more than 8 bits, which no row here has then, the
    # range would be an error.
    shifts = tf.cast(tf.range(tf.maximum(8 - bits, 0), -1, -bits), tf.uint8)
    parts = tf.bitwise.right_shift(rows[..., tf.newaxis], shifts)
    return tf.cast(parts, tf.int32) % tf.bitwise.left_shift(1, bits)


def _large_numbers(pixels: tf.Tensor) -> tf.Tensor:
    """Returns (H, W, 1) int64 of each pixel's bytes (H, W, 1 to 4), the lowest first."""
    weights = tf.constant((1, 1 << 8, 1 << 16, 1 << 24), tf.int64)[: tf.shape(pixels)[2]]
    return tf.reduce_sum(tf.cast(pixels, tf.int64) * weights, axis=-1, keepdims=True)


def _masked(numbers: tf.Tensor, masks: tf.Tensor) -> tf.Tensor:
    """Returns (H, W, 4) uint8 of pixels (H, W, 1) whose parts lie where the masks (4,) say."""
    # The lowest bit of a mask is x & -x. Dividing by it shifts the part to the right.
    lowest = tf.maximum(tf.bitwise.bitwise_and(masks, -masks), 1)
    parts = tf.bitwise.bitwise_and(numbers, masks) // lowest
    # To 8 bits as Pillow stretches 5: times 255 / 31, truncated.
    parts = parts * 255 // tf.maximum(masks // lowest, 1)
    absent = tf.constant((0, 0, 0, 255), tf.int64)
    return tf.cast(tf.where(masks > 0, parts, absent), tf.uint8)
