"""A ViT of the given variant on digits enlarged to 224 px: real input that costs almost nothing."""

from vit_dist.config import get_defaults


def get_config(variant: str = "Ti/16", *, image_size: int = 224, depth: int | None = None):
    config = get_defaults()
    config.model.variant = variant
    config.model.depth = depth
    config.image_size = image_size
    config.input.batch_size = 16
    config.input.train_ops = "resize(size)|value_range(-1, 1)"
    config.input.eval_ops = "resize(size)|value_range(-1, 1)"
    config.total_steps = 1
    config.log_steps = 1
    config.data.val_split = ""
    config.data.test_split = ""
    return config
