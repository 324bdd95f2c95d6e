"""vit_dist: distributed training of Vision Transformers with TensorFlow."""

__version__ = "0.1.0"
