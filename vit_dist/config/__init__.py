"""Every key of a run with its default, and what reads and checks the keys; needs no TensorFlow."""

from vit_dist.config.defaults import finalize, get_defaults

__all__ = ["finalize", "get_defaults"]
