"""WebP with or without alpha, and the first frame of an animated one.

TensorFlow's own decoder wants to be told whether there is alpha, and refuses animations as RGB.
Layout: RFC 9649, section 2.
"""

import tensorflow as tf

from vit_dist.data.ops import binary

CHUNK = 8  # bytes before a chunk's own: its name and length
FIRST = 12  # where the first chunk begins: after "RIFF", a length and "WEBP"
FLAGS = FIRST + CHUNK  # where a file of the extended kind (VP8X) has its flags
ANIMATED, ALPHA = 0x02, 0x10  # bits of the flags
_ALL = 1 << 30  # more bytes than a file has: substr ends where it does
_WITH_ALPHA = [bytes([flags | ALPHA]) for flags in range(256)]


@binary.one_node(binary.PIXELS)
def decode(data: tf.Tensor) -> tf.Tensor:
    """Returns the image or first frame, (H, W, 4) uint8, of a WebP's bytes; alpha 255 if none.

    Raises:
      InvalidArgumentError: There is no image, or it is cut off.
    """
    data = binary.within(data, tf.constant(FLAGS + 1))
    (flags,) = tf.unstack(binary.numbers(data, FLAGS, 1))
    # A simple file, which is none of the extended kind, has no flags.
    extended = binary.has(data, FIRST, b"VP8X")
    opaque = extended & tf.equal(tf.bitwise.bitwise_and(flags, ANIMATED | ALPHA), ANIMATED)
    # Of an animation without alpha TensorFlow writes 4 channels into a buffer for 3, and the
    # process dies. So such a file is said to have alpha, and what comes out of that is made 255.
    before, after = tf.strings.substr(data, 0, FLAGS), tf.strings.substr(data, FLAGS + 1, _ALL)
    claimed = tf.strings.join([before, tf.gather(tf.constant(_WITH_ALPHA), flags), after])
    # 3 or 4 channels, as the file has.
    pixels = tf.io.decode_image(
        tf.where(opaque, claimed, data), channels=0, expand_animations=False
    )
    missing = ((0, 0), (0, 0), (0, 1)) * (4 - tf.shape(pixels)[2])
    pixels = tf.pad(pixels, missing, constant_values=tf.constant(255, tf.uint8))
    # Levels of alpha cannot exceed 255.
    least = tf.where(opaque, tf.constant((0, 0, 0, 255), tf.uint8), tf.constant(0, tf.uint8))
    return tf.maximum(pixels, least)


def find(data: tf.Tensor, name: bytes) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where the bytes of the first chunk of that name begin, and their number; or 0, 0."""
    end = tf.strings.length(data)

    # A chunk is its name, its length (4 bytes), and its bytes, padded to an even number.
    def length(at: tf.Tensor) -> tf.Tensor:
        # A damaged length may be negative, which would lead back, or lead beyond 31 bits.
        return tf.clip_by_value(binary.numbers(data, at + 4, 1, tf.int32)[0], 0, end)

    def is_other(at: tf.Tensor) -> tf.Tensor:
        found = tf.strings.substr(data, tf.minimum(at, end), 4)
        return tf.not_equal(found, name) & (at + CHUNK <= end)

    def following(at: tf.Tensor) -> tuple[tf.Tensor]:
        count = length(at)
        return (at + CHUNK + count + count % 2,)

    at = tf.while_loop(is_other, following, (tf.constant(FIRST),))[0]
    found = at + CHUNK <= end
    at = tf.where(found, at, 0)
    return at + CHUNK, tf.where(found, length(at), 0)
