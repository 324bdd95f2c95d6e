"""Images of which a part can be read: a crop then reads its window alone."""

import abc

import tensorflow as tf


class Windowed(abc.ABC):
    """An image that is stored as pixels and not read yet; a source may give one as "image".

    Ops registered with `windows=True` take it as it is; for all others the pipe reads the whole.
    """

    # As of a tensor (H, W, 3) of unknown size, which is what ops look at while they are traced.
    dtype = tf.uint8
    shape = tf.TensorShape((None, None, 3))

    @abc.abstractmethod
    def size(self) -> tf.Tensor:
        """Returns height, width and channels, (3,) int32, as tf.shape does."""

    @abc.abstractmethod
    def window(self, begin: tf.Tensor, extent: tf.Tensor) -> tf.Tensor:
        """Returns what tf.slice gives of the whole image, uint8.

        Args:
          begin: (3,) int32, row, column and channel of the window's corner.
          extent: (3,) int32, its size with all channels.
        """

    def whole(self) -> tf.Tensor:
        """Returns all pixels, (H, W, 3) uint8."""
        return self.window(tf.zeros((3,), tf.int32), self.size())


def whole(image: tf.Tensor | Windowed) -> tf.Tensor:
    """Returns an image as a tensor, read as a whole where it has not been read yet."""
    return image.whole() if isinstance(image, Windowed) else image


def size_of(image: tf.Tensor | Windowed) -> tf.Tensor:
    """Returns height, width and channels, (3,) int32; reads no pixel."""
    return image.size() if isinstance(image, Windowed) else tf.shape(image)


def cut(image: tf.Tensor | Windowed, begin: tf.Tensor, extent: tf.Tensor) -> tf.Tensor:
    """Returns a window of an image, uint8; of one that has not been read, only its rows are."""
    if isinstance(image, Windowed):
        return image.window(begin, extent)
    return tf.slice(image, begin, extent)
