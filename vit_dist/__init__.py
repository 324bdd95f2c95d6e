"""vit_dist: distributed training of Vision Transformers with TensorFlow."""

from vit_dist.model.keras_registry import register_when_keras_is_there

__version__ = "0.2.0"

register_when_keras_is_there()
