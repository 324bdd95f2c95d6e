"""ViT-S/16 on ImageNet-1k for 90, 150 or 300 epochs: big_vision's baseline (arXiv 2205.01580).

    python -m vit_dist.train --config configs/vit_s16_i1k.py:90 --workdir runs/s16_90 \
        --config.data.data_dir=/data/tfds

| Argument | Steps   | Hours | Published |
|----------|---------|-------|-----------|
| `:90`    | 111,477 | 1.6   | 76.5 %    |
| `:150`   | 185,794 | 2.6   | 78.5 %    |
| `:300`   | 371,588 | 5.3   | 80.0 %    |

Hardware: TPU v5e-8.
What it takes of a v5e-8 and a v5p-8, compiled: docs/tpu.md. Images that an A100 or H100 takes at a
time: docs/gpu.md, estimated.
Hours: not measured: 6 x multiply-adds of the forward pass, at 35 % of 8 x 197 TFLOP/s. Hosts
must decode 20,000 images/s for that. big_vision reports 6-7 hours for 90 epochs on a TPU v3-8.
Published: top-1 on ImageNet's validation set, in arXiv 2205.01580. Not run here.

The published runs have float32 activations; --config.precision=bfloat16 is faster.
"""

from vit_dist.config import get_defaults
from vit_dist.config.recipe import parse_arg, use_imagenet


def get_config(arg=None):
    arg = parse_arg(arg, epochs=(90, 150, 300))
    config = get_defaults()
    config.image_size = 224
    config.total_epochs = float(arg.epochs)
    use_imagenet(config)

    config.input.batch_size = 1024
    config.input.train_ops = (
        "decode_jpeg_and_inception_crop(size)|flip_lr|randaug(2, 10)|value_range(-1, 1)"
    )
    config.input.eval_ops = "decode|resize_small(256)|central_crop(size)|value_range(-1, 1)"
    # One draw from Beta(0.2, 0.2) for the whole batch; the example itself has the larger share.
    config.mixing.mixup_alpha = 0.2
    config.mixing.fold_lambda = True

    config.model.variant = "S/16"
    config.model.pool = "gap"
    config.model.posemb = "sincos2d"
    config.model.rep_size = -1

    config.optimizer.learning_rate = 1e-3
    # big_vision multiplies the decay by schedule / peak, not by the learning rate.
    config.optimizer.weight_decay = 1e-4
    config.optimizer.decay_scale = "schedule"
    config.optimizer.momentum_dtype = "bfloat16"
    config.schedule.warmup_steps = 10_000
    config.step.clip_norm = 1.0
    return config
