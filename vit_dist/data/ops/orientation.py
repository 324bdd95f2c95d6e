"""EXIF orientation: which way up a camera held the sensor (CIPA DC-008, tag 0x0112).

The eight ways are a transposition (5 to 8), then mirrors: left and right (2, 3, 6, 7), up and down
(3, 4, 7, 8). 1 is upright, and so are files that say nothing.
"""

import tensorflow as tf

from vit_dist.data.ops import binary, jpeg, png, webp

TAG = 0x0112
SHORT, LONG = 3, 4  # types of numbers, of 2 and 4 bytes
ENTRY = 12  # bytes of one entry of a directory: tag, type, count, value


def of_jpeg(data: tf.Tensor) -> tf.Tensor:
    """Returns the orientation, () int32 of 1 to 8, that a JPEG's bytes give; 1 if they do not."""
    return tf.cond(
        jpeg.may_have_exif(data),
        lambda: _read(_cut(data, *jpeg.find_exif(data))),
        lambda: tf.constant(1),
    )


def of_other(data: tf.Tensor) -> tf.Tensor:
    """As `of_jpeg`, of PNG and WebP; BMP and GIF hold no EXIF."""
    nothing = tf.constant(0), tf.constant(0)
    # Where EXIF lies: a chunk of its own in both formats.
    place = tf.cond(
        binary.has(data, 0, b"\x89PNG"),
        lambda: png.find(data, b"eXIf"),
        lambda: tf.cond(
            binary.has(data, 0, b"RIFF"), lambda: webp.find(data, b"EXIF"), lambda: nothing
        ),
    )
    return _read(_cut(data, *place))


def _cut(data: tf.Tensor, at: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Returns `count` bytes of EXIF from place `at` on, without the name that JPEG needs."""
    # PNG and WebP need none, but some programs write it.
    name = tf.strings.substr(data, at, len(jpeg.EXIF_NAME))
    skipped = tf.where(tf.equal(name, jpeg.EXIF_NAME), len(jpeg.EXIF_NAME), 0)
    return tf.strings.substr(data, at + skipped, tf.maximum(count - skipped, 0))


@binary.one_node(tf.TensorSpec((), tf.int32))
def _read(exif: tf.Tensor) -> tf.Tensor:
    """Returns the orientation in bytes of EXIF, which is a TIFF file without pixels."""
    little = tf.equal(tf.strings.substr(exif, 0, 1), b"I")  # Intel's order of bytes or Motorola's

    def words(at: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """`count` numbers of 2 bytes, int32; beyond the end they are 0."""
        raw = tf.strings.substr(exif, at, 2 * count)
        # Read in both byte orders, as the order is an attribute of the op and not an input.
        both = [
            tf.io.decode_raw(raw, tf.uint16, little_endian=order, fixed_length=2 * count)
            for order in (True, False)
        ]
        return tf.cast(tf.where(little, *both), tf.int32)

    end = tf.strings.length(exif)
    # Bytes 4 to 7: where the directory begins, as two words whose order is that of the bytes.
    first, second = tf.unstack(tf.ensure_shape(words(tf.minimum(4, end), 2), (2,)))
    directory = tf.where(little, first + 65536 * second, 65536 * first + second)
    # A damaged file may say anything; from the end on, all is 0, which is no entry.
    directory = tf.where((directory >= 0) & (directory <= end - 2), directory, end)
    entries = words(directory, 1)[0]
    # One more than there are, as none at all cannot be read; it is not looked at.
    table = words(tf.minimum(directory + 2, end), (entries + 1) * (ENTRY // 2))
    # 12 bytes, 6 words: tag, type, count (2), value (2).
    tag, kind, _, _, low, high = tf.unstack(tf.reshape(table, (-1, ENTRY // 2)), axis=1)
    # A SHORT stands in the first word of the value; a LONG of such a small number in its lower
    # word.
    value = tf.where(tf.equal(kind, LONG) & ~little, high, low)
    found = tf.equal(tag, TAG) & (tf.equal(kind, SHORT) | tf.equal(kind, LONG))
    found &= tf.range(entries + 1) < entries
    way = tf.reduce_max(tf.where(found, value, 1))
    return tf.where((way >= 1) & (way <= 8), way, 1)


def turn(image: tf.Tensor, way: tf.Tensor) -> tf.Tensor:
    """Returns an image, (H, W, C) or (W, H, C), the right way up, from `way` () int32, 1 to 8."""

    def turned() -> tf.Tensor:
        upright = tf.cond(way >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
        return tf.raw_ops.Reverse(tensor=upright, dims=tf.concat([_mirrors(way), [False]], axis=0))

    # Reverse copies the image even where nothing is to be mirrored.
    return tf.cond(way > 1, turned, lambda: image)


def stored_window(
    way: tf.Tensor, begin: tf.Tensor, extent: tf.Tensor, shape: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where a window of the upright image lies in the image as stored: begin and extent.

    Args:
      way: () int32, 1 to 8.
      begin: (2,) int32, row and column of the window's corner in the upright image.
      extent: (2,) int32, its height and width.
      shape: (2,) int32, height and width of the upright image.
    """
    begin = tf.where(_mirrors(way), shape - extent - begin, begin)
    # `turn` transposes first and mirrors then; here both are undone, in the other order.
    return swap_sides(way, begin), swap_sides(way, extent)


def swap_sides(way: tf.Tensor, pair: tf.Tensor) -> tf.Tensor:
    """Returns (height, width) of the upright image from that of the stored one, or back."""
    return tf.where(way >= 5, pair[::-1], pair)


def _mirrors(way: tf.Tensor) -> tf.Tensor:
    """Returns whether up and down, and left and right, are exchanged, (2,) bool."""
    return tf.reduce_any(tf.equal(way, ((3, 4, 7, 8), (2, 3, 6, 7))), axis=1)
