"""BMP files: palettes, masks of bits and run lengths.

TensorFlow's own decoder takes the numbers of a palette for grey levels, ignores compression, and
refuses 1, 4 and 16 bits a pixel and any byte after the pixels. Layout: [MS-WMF] 2.2.2 and Windows'
documentation of BITMAPINFOHEADER; what those leave open is as in Pillow (BmpImagePlugin.py).
"""

from typing import NamedTuple

import tensorflow as tf

from vit_dist.data.ops import binary
from vit_dist.data.tracing import switch

FILE_HEADER = 14  # bytes before the image's own header
OS2_HEADER = 12  # bytes of the oldest kind of header, whose numbers are shorter
HEADERS = (OS2_HEADER, 40, 52, 56, 64, 108, 124)
RAW, RLE8, RLE4, MASKS, ALPHA_MASKS = 0, 1, 2, 3, 6  # the header's "compression"
# What is read: pairs of compression and bits a pixel. 4 and 5 are a JPEG or PNG inside of a BMP.
KINDS = (
    *((RAW, bits) for bits in (1, 2, 4, 8, 16, 24, 32)),
    *((RLE8, 8), (RLE4, 4)),
    *((masks, bits) for masks in (MASKS, ALPHA_MASKS) for bits in (16, 24, 32)),
)
# Which bits are red, green, blue, alpha: of 16 without compression, and where all masks are 0 (as
# Pillow reads that).
RAW_MASKS = (0x7C00, 0x03E0, 0x001F, 0)
BYTE_MASKS = (0xFF0000, 0x00FF00, 0x0000FF, 0xFF000000)
_UNKNOWN = (
    "a BMP that is not read (header of {} bytes, {} bits a pixel, compression {}, {} x {} pixels): "
    "open it in an image program and save it as PNG"
)
_ALL = 1 << 30  # more bytes than a file has: substr ends where it does


class _Header(NamedTuple):
    """What comes before the pixels; () int32 each, but for the last two."""

    width: tf.Tensor
    height: tf.Tensor
    stride: tf.Tensor  # bytes of a row without compression, a multiple of 4
    bits: tf.Tensor  # of a pixel
    compression: tf.Tensor
    start: tf.Tensor  # where the pixels begin
    palette: tf.Tensor  # (n, 3) uint8; n is 0 where there is none
    masks: tf.Tensor  # (4,) int64


def decode(data: tf.Tensor) -> tf.Tensor:
    """Returns the pixels, (H, W, 4) uint8, of a BMP's bytes; alpha is 255 where there is none.

    Raises:
      InvalidArgumentError: The file is cut off, or of a kind that is not read; says which.
    """
    data, header, top_down = _read_header(data)
    compressed = tf.equal(header.compression, RLE8) | tf.equal(header.compression, RLE4)
    whole_bytes = tf.equal(header.compression, RAW) & (header.bits >= 24)
    # Which of the branches below.
    kind = tf.where(whole_bytes, 2, 3)
    kind = tf.where(compressed, 0, tf.where(header.bits <= 8, 1, kind))

    def of_palette(numbers: tf.Tensor) -> tf.Tensor:
        return _opaque(tf.gather(header.palette, numbers))

    pixels = switch(
        kind,
        [
            lambda: of_palette(_run_lengths(binary.read(data, header.start, _ALL), header)),
            lambda: of_palette(_small_numbers(_rows(data, header), header)),
            # Blue, green, red and at 32 bits a byte that means nothing.
            lambda: _opaque(_pixels(data, header)[..., 2::-1]),
            lambda: _masked(_pixels(data, header), header),
        ],
    )
    return tf.raw_ops.Reverse(tensor=pixels, dims=tf.stack([~top_down, False, False]))


def _read_header(data: tf.Tensor) -> tuple[tf.Tensor, _Header, tf.Tensor]:
    """Returns the data, for what may be read only where the header is sound, and the header.

    And whether the first row that is stored is the top one.
    """
    # Numbers of 4 bytes from the third byte on; two of 2 bytes are one of them.
    words = tf.unstack(binary.numbers(data, 2, 17, tf.int32))
    start, size, first, second, third = words[2], words[3], words[4], words[5], words[6]
    longer = (first, second, third // 65536, words[7], words[11], 4)
    os2 = (first % 65536, first // 65536, second // 65536, RAW, 0, 3)
    is_os2 = tf.equal(size, OS2_HEADER)
    width, height, bits, compression, colors, entry = tf.unstack(tf.where(is_os2, os2, longer))
    known = tf.reduce_any(tf.reduce_all(tf.equal([compression, bits], KINDS), axis=1))
    known &= tf.reduce_any(tf.equal(size, HEADERS))
    # In floating point: the product of a damaged header's numbers may exceed 31 bits.
    area = tf.cast(width, tf.float32) * tf.cast(tf.abs(height), tf.float32)
    known &= (width > 0) & (area > 0) & (area <= binary.MAX_PIXELS)
    data = binary.require(data, known, _UNKNOWN, size, bits, compression, width, height)
    stride = (width * bits + 31) // 32 * 4
    # What is compressed may have any length; the search for its end ends with the data.
    missing = start + stride * tf.abs(height) - tf.strings.length(data)
    whole = (missing <= 0) | tf.equal(compression, RLE8) | tf.equal(compression, RLE4)
    data = binary.require(data, whole, "a BMP that is cut off: {} bytes are missing", missing)

    most = tf.where(bits <= 8, tf.bitwise.left_shift(1, tf.minimum(bits, 8)), 0)
    colors = tf.where((colors > 0) & (colors <= most), colors, most)
    stored = binary.read(data, FILE_HEADER + size, colors * entry)
    # Some writers forget the palette when they say where the pixels begin.
    forgotten = tf.equal(start, FILE_HEADER + size)
    header = _Header(
        width=width,
        height=tf.abs(height),
        stride=stride,
        bits=bits,
        compression=compression,
        start=start + tf.where(forgotten, entry * colors, 0),
        # Blue comes first; a fourth byte means nothing.
        palette=tf.reshape(stored, (colors, entry))[:, 2::-1],
        masks=_masks(tf.stack(words[13:]), size, compression),
    )
    return data, header, height < 0


def _masks(stored: tf.Tensor, size: tf.Tensor, compression: tf.Tensor) -> tf.Tensor:
    """Returns which bits of a pixel are red, green, blue and alpha, (4,) int64; 0 where none."""
    # Headers of 40 and 52 bytes have no alpha, but by a kind of compression of its own.
    has_alpha = (size >= 56) | tf.equal(compression, ALPHA_MASKS)
    stored = tf.where(tf.stack([True, True, True, has_alpha]), stored, 0)
    masks = tf.cast(stored, tf.int64) % (1 << 32)  # as unsigned
    masks = tf.where(tf.reduce_any(masks > 0), masks, BYTE_MASKS)
    return tf.where(tf.equal(compression, RAW), tf.constant(RAW_MASKS, tf.int64), masks)


def _rows(data: tf.Tensor, header: _Header) -> tf.Tensor:
    """Returns the rows as stored, (H, bytes) uint8."""
    stored = binary.read(data, header.start, header.height * header.stride)
    return tf.reshape(stored, (header.height, header.stride))


def _small_numbers(rows: tf.Tensor, header: _Header) -> tf.Tensor:
    """Returns (H, W) int32 of pixels of 1, 2, 4 or 8 bits; the first is in the highest bits."""
    shifts = tf.cast(tf.range(8 - header.bits, -1, -header.bits), tf.uint8)
    parts = tf.cast(tf.bitwise.right_shift(rows[..., tf.newaxis], shifts), tf.int32)
    parts %= tf.bitwise.left_shift(1, header.bits)
    return tf.reshape(parts, (header.height, -1))[:, : header.width]


def _pixels(data: tf.Tensor, header: _Header) -> tf.Tensor:
    """Returns the bytes of each pixel, (H, W, 2 to 4) uint8."""
    size = header.bits // 8
    rows = _rows(data, header)[:, : header.width * size]
    return tf.reshape(rows, (header.height, header.width, size))


def _opaque(colors: tf.Tensor) -> tf.Tensor:
    """Returns colours (H, W, 3) uint8 with an alpha of 255."""
    return tf.pad(colors, ((0, 0), (0, 0), (0, 1)), constant_values=tf.constant(255, tf.uint8))


def _masked(pixels: tf.Tensor, header: _Header) -> tf.Tensor:
    """Returns (H, W, 4) uint8 of pixels (H, W, 2 to 4) whose parts lie where the masks say."""
    weights = tf.constant((1, 1 << 8, 1 << 16, 1 << 24), tf.int64)[: header.bits // 8]
    whole = tf.reduce_sum(tf.cast(pixels, tf.int64) * weights, axis=-1, keepdims=True)
    # The lowest bit of a mask is x & -x. Dividing by it shifts the part to the right.
    masks = header.masks
    lowest = tf.maximum(tf.bitwise.bitwise_and(masks, -masks), 1)
    parts = tf.bitwise.bitwise_and(whole, masks) // lowest
    # To 8 bits as Pillow stretches 5: times 255 / 31, truncated.
    parts = parts * 255 // tf.maximum(masks // lowest, 1)
    absent = tf.constant((0, 0, 0, 255), tf.int64)
    return tf.cast(tf.where(masks > 0, parts, absent), tf.uint8)


def _run_lengths(stream: tf.Tensor, header: _Header) -> tf.Tensor:
    """Returns the numbers of pixels that are stored as runs, (H, W) int32; 0 where none is set.

    The stream (n,) uint8 is a chain of commands, each a pair of bytes and what follows it:
      (0, 0)  end of the row
      (0, 1)  end of the image
      (0, 2)  skip: the next two bytes say how far to the right, and how many rows
      (0, n)  n pixels as they stand in the next bytes, whose number is even
      (n, v)  n pixels of v; of RLE4 in turn of v's upper and lower half
    A graph would take 20 microseconds for each in turn, so they are found all at once: where the
    next one begins is known for every pair, whether it is a command or not, and jumps of doubled
    length from pair to pair (1, 2, 4, ...) mark those that are reached from the first.
    """
    end_row, _, skip, literal, run = range(5)
    rle4 = tf.equal(header.compression, RLE4)
    count = tf.size(stream) // 2
    pairs = tf.cast(tf.reshape(stream[: 2 * count], (-1, 2)), tf.int32)
    first, second = tf.unstack(pairs, axis=1)
    kind = tf.where(first > 0, run, tf.minimum(second, literal))
    bytes_ = tf.where(rle4, (second + 1) // 2, second)
    # In pairs. From the end of the image there is no way on but to the end of the stream.
    length = tf.gather(tf.stack([1, count, 2, 0, 1]), kind)
    length = tf.where(tf.equal(kind, literal), 1 + (bytes_ + 1) // 2, length)
    after = tf.minimum(tf.range(count) + length, count)
    # Numbers of the pairs that are commands.
    at = tf.cast(tf.where(_chain(tf.concat([after, [count]], axis=0))[:-1])[:, 0], tf.int32)

    commands = tf.gather(tf.stack([first, second, kind], axis=1), at)
    first, second, kind = tf.unstack(commands, axis=1)
    following = tf.gather(pairs, tf.minimum(at + 1, count - 1))
    right, down = tf.unstack(following * tf.cast(tf.equal(kind, skip), tf.int32)[:, None], axis=1)
    pixels = tf.where(tf.equal(kind, literal), second, first)
    new_row = tf.cast(tf.equal(kind, end_row), tf.int32)
    row = tf.cumsum(down + new_row, exclusive=True)
    # How far right a command begins: all that was advanced, less what was where its row began.
    advanced = tf.cumsum(pixels + right, exclusive=True)
    line = tf.cumsum(new_row, exclusive=True)
    column = advanced - tf.gather(tf.math.segment_min(advanced, line), line)

    # One entry for each pixel: `of` is its command, `k` its place in that.
    ends = tf.cumsum(pixels)
    every = tf.range(tf.reduce_max(ends))
    of = tf.raw_ops.UpperBound(sorted_inputs=ends[None], values=every[None])[0]
    info = tf.stack([ends - pixels, row, column, kind, second, 2 * at + 2], axis=1)
    start, y, x, kind, value, data_at = tf.unstack(tf.gather(info, of), axis=1)
    k = every - start
    data_at = tf.minimum(data_at + tf.where(rle4, k // 2, k), 2 * count - 1)
    byte = tf.where(tf.equal(kind, literal), tf.cast(tf.gather(stream, data_at), tf.int32), value)
    half = tf.where(tf.equal(k % 2, 0), byte // 16, byte % 16)
    number = tf.where(rle4, half, byte)
    # What lies outside goes to a place behind the last pixel.
    # TensorFlow may evaluate this before the checks of the header, where the file is a constant.
    width, area = header.width, tf.minimum(header.width * header.height, binary.MAX_PIXELS)
    inside = (x + k < width) & (y < header.height)
    place = tf.where(inside, y * width + x + k, area)
    empty = tf.zeros([area + 1], tf.int32)
    filled = tf.tensor_scatter_nd_update(empty, place[:, None], number)
    return tf.reshape(filled[:-1], (header.height, width))


def _chain(after: tf.Tensor) -> tf.Tensor:
    """Returns which places are reached from 0, (n,) bool, if `after` (n,) follows each."""
    count = tf.size(after)

    def double(jump: tf.Tensor, reached: tf.Tensor, step: tf.Tensor):
        found = tf.tensor_scatter_nd_max(reached, jump[:, None], reached)
        return tf.gather(jump, jump), found, 2 * step

    reached = tf.one_hot(0, count, dtype=tf.int32)
    start = (after, reached, tf.constant(1))
    return tf.while_loop(lambda jump, reached, step: step < count, double, start)[1] > 0
