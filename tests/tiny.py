"""A config for tests that train: the demo's digits at their own 8 px, the smallest ViT, no XLA."""

from vit_dist.config import get_defaults

OPS = "value_range(-1, 1)|keep('image', 'label')"


def get_config():
    config = get_defaults()
    config.image_size = 8
    config.total_steps = 12
    config.log_steps = 4
    config.eval_steps = 100
    config.save_steps = 100
    config.input.batch_size = 16
    config.input.eval_batch_size = 180
    config.input.train_ops = f"random_shift(1)|{OPS}"
    config.input.eval_ops = OPS
    config.input.num_threads = 1
    config.model.variant = "mu/4"
    config.model.width = 16
    config.model.mlp_dim = 16
    config.model.dropout = 0.1
    config.schedule.name = "constant"
    config.step.jit = "off"
    return config
