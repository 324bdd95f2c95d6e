"""A small ViT on scikit-learn's handwritten digits: pretrain at 16 px, fine-tune at 32 px.

`make demo` runs both and compares them. By hand:

    python -m vit_dist.train --config configs/demo.py --workdir runs/demo/pretrain
    python -m vit_dist.train --config configs/demo.py:finetune --workdir runs/demo/finetune \
        --config.init_from=runs/demo/pretrain

Hardware: 2 CPU cores, under 3 minutes for both.
"""

from vit_dist.config import get_defaults


def get_config(arg: str = "pretrain"):
    if arg not in ("pretrain", "finetune"):
        raise ValueError(f"configs/demo.py:{arg} is unknown; use :pretrain or :finetune")
    config = get_defaults()
    config.image_size = 16
    config.total_epochs = 60.0
    config.log_steps = 50

    # The digits are arrays of 8 x 8 pixels, so the pipes have no op that decodes.
    config.data.source = "demo"
    config.input.batch_size = 128
    config.input.eval_batch_size = 180
    # No flips: a mirrored 2 is no 2.
    config.input.train_ops = (
        "random_shift(1)|resize(size)|value_range(-1, 1)|keep('image', 'label')"
    )
    config.input.eval_ops = "resize(size)|value_range(-1, 1)|keep('image', 'label')"

    config.model.variant = "mu/4"
    config.model.width = 64
    config.model.depth = 4
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.pool = "tok"
    config.model.dropout = 0.1

    config.loss.label_smoothing = 0.1
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.3
    config.schedule.warmup_percent = 10.0
    # A short run: the average reaches over some 50 steps.
    config.step.ema_decay = 0.98

    # Twice the resolution at the same patch size: four times as many tokens, resampled positions.
    if arg == "finetune":
        config.image_size = 32
        config.total_epochs = 15.0
        config.optimizer.learning_rate = 5e-4
    return config
