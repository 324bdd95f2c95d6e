"""The patch kernel of another ViT: for patches of another size, or images of other channels."""

import numpy as np
import tensorflow as tf


def resize_kernel(kernel: np.ndarray, patch_size: int) -> np.ndarray:
    """FlexiViT's pseudo-inverse resize (arXiv 2212.08013, equation 4).

    With B the matrix of a bilinear (half-pixel, no antialiasing) resize of a patch, the new kernel
    is pinv(B^T) w: on patches resized by B it gives what the old one gives on those before.
    Exactly so where patches grow; nearest in the mean over white noise where they shrink.

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

    One channel gets the sum over the old ones, so that a grey image gives what it gave repeated
    over them; several get the old ones over and over, scaled to keep the size of the result.

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
