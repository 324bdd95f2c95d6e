"""vit_dist: distributed training of Vision Transformers with TensorFlow."""

__version__ = "0.2.0"
