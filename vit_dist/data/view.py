"""What the model will see, as uint8 images for people: for contact sheets and TensorBoard."""

import numpy as np
import tensorflow as tf

from vit_dist.data.mixing import Mixing
from vit_dist.data.ops.decoding import decode_whole
from vit_dist.data.ops.pipe import Pipe

Tensors = dict[str, tf.Tensor]


def stages(
    pipe: Pipe, example: Tensors, *, stored: bytes | np.ndarray | None = None
) -> list[np.ndarray]:
    """Returns an example's image as stored and after each op of the pipe that works on images.

    Args:
      pipe: The pipe. Its first n ops alone draw the same random numbers as within the whole, since
        the numbers depend on an op's position.
      example: As a source gives it, with "index", "epoch" and "seed".
      stored: The image as stored, where the example's has been decoded by a cache.

    Returns:
      uint8 (H, W, 3) each; their sizes differ.
    """
    image = example["image"] if stored is None else tf.constant(stored)
    if image.dtype == tf.string:
        image = decode_whole(image)
    shown = [image.numpy()]
    for i, step in enumerate(pipe.steps, 1):
        # The device op takes batches, so this one image becomes a batch of one.
        if step.op.on_device:
            last = shown[-1]
            shown.append(viewable(pipe, pipe.device(tf.constant(last)[tf.newaxis]))[0])
        elif step.op.image:
            # From the stored image on each time: the first i ops give the same again, because they
            # draw from the seed alone.
            image = Pipe(pipe.text, pipe.steps[:i]).host(example)["image"]
            # Before the op that decodes, the image is still the bytes of its file.
            shown.append(shown[0] if image.dtype == tf.string else image.numpy())
    return shown


def viewable(pipe: Pipe, images: tf.Tensor) -> np.ndarray:
    """Returns scaled images, (B, H, W, 3) float32 as of `pipe.device`, as uint8 of 0..255 again.

    What black and white become in the pipe tells, for each channel, how to undo its scaling.
    """
    # Two images, one all black and one all white, (2, H, W, 3).
    ends = np.array([0, 255], np.uint8)[:, None, None, None]
    black, white = pipe.device(tf.constant(np.broadcast_to(ends, (2, *images.shape[1:])))).numpy()
    # Scaling is linear, so what black and white become tells how to undo it.
    shown = (np.asarray(images) - black) / (white - black) * 255
    return np.clip(np.round(shown), 0, 255).astype(np.uint8)


def batch_images(
    pipe: Pipe, batch: Tensors, mixing: Mixing | None, *, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a training batch, which holds whole groups of the mixing, as the model sees it.

    Returns:
      Images, uint8 (B, H, W, 3), and labels: (B,) class numbers, or (B, num_classes) shares where
      the pipe or the mixing makes such.
    """
    images, labels = pipe.device(batch["image"]), batch["label"]
    if mixing is not None:
        images = mixing.images(images, batch["mix"])
        # Shares of two classes need rows of floats.
        if labels.shape.rank == 1:
            labels = tf.one_hot(labels, num_classes)
        labels = mixing.labels(labels, batch["mix"])
    return viewable(pipe, images), np.asarray(labels)
