"""Fine-tuning at 384 px with SGD, as vision_transformer does after pretraining on ImageNet-21k.

    python -m vit_dist.train --config configs/finetune_384.py:imagenet2012,model=B/16 \
        --workdir runs/b16_384 --config.init_from=runs/augreg_b16_i21k \
        --config.data.data_dir=/data/tfds

| Argument               | Steps  | Hours |
|------------------------|--------|-------|
| `:imagenet2012`        | 20,000 | 1.7   |
| `:cifar10`             | 10,000 | 0.9   |
| `:cifar100`            | 10,000 | 0.9   |
| `:oxford_iiit_pet`     | 500    | 0.04  |
| `:oxford_flowers102`   | 500    | 0.04  |

Hardware: TPU v5e-8, or one GPU: 8 micro-batches of 64 images (--config.step.accumulation).
What it takes of a v5e-8 and a v5p-8, compiled: docs/tpu.md. Images that an A100 or H100 takes at a
time: docs/gpu.md, estimated.
Hours: not measured: 6 x multiply-adds of the forward pass of B/16, at 35 % of 8 x 197 TFLOP/s.
Published: 78.22 (Ti/16), 79.58 (S/32), 83.73 (S/16), 83.59 (B/32), 85.49 (B/16) and 85.59 % (L/16)
top-1 on ImageNet from AugReg's checkpoints, in vision_transformer's README. Not run here.

`model` is the model that was pretrained. `lr` is the peak of the learning rate: by default 0.03,
but 0.01 for CIFAR-10 and, as in the published runs on ImageNet, for B/32, S/32 and L/16.
configs/transfer.py with recipe=vision_transformer does the same with any model, resolution and
weights, and with folders.
"""

from vit_dist.config import get_defaults
from vit_dist.config.recipe import (
    TRANSFER_TASKS,
    parse_arg,
    use_transfer_data,
    use_vision_transformer,
)


def get_config(arg=None):
    arg = parse_arg(
        arg,
        data=tuple(TRANSFER_TASKS),
        model=("B/16", "Ti/16", "S/32", "S/16", "B/32", "L/16"),
        lr=0.0,
    )
    config = get_defaults()
    config.image_size = 384
    config.model.variant, config.model.pool = arg.model, "tok"
    use_transfer_data(config, arg.data)
    use_vision_transformer(config, dataset=arg.data, scale="value_range(-1, 1)")
    # 0.0 stands for "not given".
    if arg.lr:
        config.optimizer.learning_rate = arg.lr
    return config
