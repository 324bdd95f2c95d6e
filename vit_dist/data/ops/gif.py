"""The first frame of a GIF on its screen, with the colours of its palette.

TensorFlow's own decoder loses the frame's place on the screen and makes black of what is
transparent. So the frame gets a new beginning of the file, whose palette is 0..255: what TensorFlow
decodes then are the numbers of the pixels' colours. Layout: the GIF89a specification; what that
leaves open is as in Pillow (GifImagePlugin.py).
"""

import tensorflow as tf

from vit_dist.data.ops import binary

SCREEN = 13  # bytes before the palette: signature and size of the screen
EXTENSION, IMAGE, CONTROL = 0x21, 0x2C, 0xF9  # how blocks begin, and the extension that is read
IMAGE_HEADER = 10  # bytes before a frame's own palette
TABLE, INTERLACED, TRANSPARENT = 0x80, 0x40, 0x01  # bits of the flags

# By a flags byte: how many bytes its palette has. The lower three bits are the logarithm of the
# number of colours, less 1.
_TABLE_BYTES = [3 << (flags % 8 + 1) if flags & TABLE else 0 for flags in range(256)]
_PALETTE = bytes(value for number in range(256) for value in (number,) * 3)
# What follows the screen's size in the new file: flags with 256 colours, background, aspect ratio,
# palette, and the frame's header up to its size.
_AFTER_SIZE = bytes((TABLE | 7, 0, 0)) + _PALETTE + bytes((IMAGE, 0, 0, 0, 0))
_TOO_LARGE = "a GIF of {} x {} pixels, which is more than is read: save its image as PNG"


@binary.one_node(binary.PIXELS)
def decode(data: tf.Tensor) -> tf.Tensor:
    """Returns the first frame, (H, W, 4) uint8, of a GIF's bytes; alpha is 0 or 255.

    Raises:
      InvalidArgumentError: There is no frame, or it is cut off.
    """
    table_bytes = tf.constant(_TABLE_BYTES)
    # Numbers of 2 bytes from the screen's size on; the flags are a byte.
    data = binary.within(data, tf.constant(6))
    across, down, flags = tf.unstack(binary.numbers(data, 6, 3, tf.uint16))
    shared = tf.gather(table_bytes, flags % 256)
    at, transparent = _skip_extensions(data, SCREEN + shared)
    # From the byte before the frame's header on, so that its kind is the upper half of a number,
    # and its flags are the lower half of one.
    frame = tf.unstack(binary.numbers(binary.within(data, at - 1), at - 1, 6, tf.uint16))
    kind, left, top, width, height, flags = frame
    data = binary.require(data, tf.equal(kind // 256, IMAGE), "a GIF without an image")

    own = tf.gather(table_bytes, flags % 256)
    data = binary.within(data, at + IMAGE_HEADER + own)
    size = tf.strings.substr(data, at + 5, 4)
    interlaced = tf.bitwise.bitwise_and(flags, INTERLACED) > 0
    rest = tf.strings.substr(data, at + IMAGE_HEADER + own, tf.strings.length(data))
    order = tf.where(interlaced, bytes((INTERLACED,)), b"\0")
    plain = tf.strings.join([b"GIF89a", size, _AFTER_SIZE, size, order, rest])
    frame = tf.io.decode_image(plain, channels=3, expand_animations=False)[..., 0]

    down, across = tf.maximum(down, top + height), tf.maximum(across, left + width)
    usable = down <= binary.MAX_PIXELS // tf.maximum(across, 1)
    frame = binary.require(frame, usable, _TOO_LARGE, across, down)
    # Of a constant file TensorFlow may pad when it optimises the graph: before the check.
    margins = tf.where(usable, ((top, down - top - height), (left, across - left - width)), 0)
    # Around the frame Pillow has the transparent colour, and else colour 0.
    around = tf.cast(tf.maximum(transparent, 0), tf.uint8)
    pixels = tf.pad(frame, margins, constant_values=around)
    place = tf.where(own > 0, at + IMAGE_HEADER, SCREEN)
    palette = tf.reshape(binary.read(data, place, tf.where(own > 0, own, shared)), (-1, 3))
    pixels = tf.cast(pixels, tf.int32)
    alpha = tf.cast(tf.where(tf.equal(pixels, transparent), 0, 255), tf.uint8)
    return tf.concat([tf.gather(palette, pixels), alpha[..., tf.newaxis]], axis=2)


def _skip_extensions(data: tf.Tensor, at: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where the first frame begins, and the number of the transparent colour, or -1."""
    stored = tf.io.decode_raw(data, tf.uint8)

    # An extension is two bytes and a chain of blocks: a byte with a length, so many bytes, and so
    # on until a length of 0. `within` says whether `at` is where a block begins.
    def goes_on(at: tf.Tensor, within: tf.Tensor, _) -> tf.Tensor:
        return within | tf.equal(tf.gather(stored, at), EXTENSION)

    def skip(at: tf.Tensor, within: tf.Tensor, transparent: tf.Tensor):
        first, kind, _, flags, _, _, color, _ = tf.unstack(binary.numbers(data, at, 8))
        # Extension, kind, 4, flags, delay (2 bytes), transparent colour, 0.
        says = tf.equal(kind, CONTROL) & (tf.bitwise.bitwise_and(flags, TRANSPARENT) > 0)
        transparent = tf.where(says & ~within, color, transparent)
        at += tf.where(within, 1 + first, 2)
        return at, ~within | (first > 0), transparent

    start = (at, tf.constant(False), tf.constant(-1))
    at, _, transparent = tf.while_loop(goes_on, skip, start)
    return at, transparent
