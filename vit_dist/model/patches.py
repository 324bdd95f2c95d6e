"""The patch kernel of another ViT: for patches of another size, or images of other channels."""

import numpy as np
import tensorflow as tf


def resize_kernel(kernel: np.ndarray, patch_size: int) -> np.ndarray:
    """FlexiViT's pseudo-inverse resize (arXiv 2212.08013, equation 4).

    With B the matrix of a bilinear (half-pixel, no antialiasing) resize of a patch, the new kernel
    is pinv(B^T) w. On a patch resized by B it gives what the old kernel w gives on the patch: the
    same where patches grow; where they shrink, the nearest in the mean over white noise.

    Args:
      kernel: float (p, q, C, D).
      patch_size: the new p and q.

    Returns:
      float32 (patch_size, patch_size, C, D).
    """
    p, q, channels, width = kernel.shape
    basis: np.ndarray = np.eye(p * q, dtype=np.float32).reshape(p, q, p * q)
    # Resizing is linear, so resizing all p * q unit patches at once (as channels of one image)
    # gives the columns of B.
    resized = tf.image.resize(basis, (patch_size, patch_size), "bilinear").numpy()
    matrix = resized.reshape(patch_size**2, p * q).astype(np.float64)  # B
    flat = np.asarray(kernel, np.float64).reshape(p * q, -1)
    new = np.linalg.pinv(matrix.T) @ flat
    return new.reshape(patch_size, patch_size, channels, width).astype(np.float32)


def change_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The kernel for another number of input channels, as timm does it.

    One channel gets the sum over the old channels, so that a grey image gives what it gave when it
    was repeated over them. Several channels get the old ones in turn, scaled by old / new so that
    the result keeps its size.

    Args:
      kernel: float (p, q, C, D).
      channels: the new C.

    Returns:
      float32 (p, q, channels, D).
    """
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True, dtype=np.float32)
    # Red, green, blue, red, ... until there are enough; timm's adapt_input_conv.
    return (kernel[:, :, np.arange(channels) % old] * (old / channels)).astype(np.float32)
