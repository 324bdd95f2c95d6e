"""The original ViT, "An Image is Worth 16x16 Words" (arXiv 2010.11929): ImageNet-21k pretraining.

    python -m vit_dist.train --config configs/vit_i21k.py:B/16 --workdir runs/vit_b16_i21k \
        --config.data.data_dir=/data/tfds

| Argument            | Steps   | Hours | Published |
|---------------------|---------|-------|-----------|
| `:B/32`             | 310,823 | 17    | 81.28 %   |
| `:B/16`             | 310,823 | 68    | 83.97 %   |
| `:L/32`             | 310,823 | 59    | 80.99 %   |
| `:L/16`             | 310,823 | 237   | 85.15 %   |
| `:L/16,epochs=30`   | 103,608 | 79    | -         |

Hardware: TPU v5e-8; where memory is short, --config.step.accumulation or --config.model.remat.
What it takes of a v5e-8 and a v5p-8, compiled: docs/tpu.md. Images that an A100 or H100 takes at a
time: docs/gpu.md, estimated.
Hours: not measured: 6 x multiply-adds of the forward pass, at 35 % of 8 x 197 TFLOP/s.
Published: ImageNet top-1 after fine-tuning at 384 px (configs/finetune_384.py), tables 3 and 5 of
the paper, which gives 90 epochs for B and 30 or 90 for L. Not run here.

ImageNet-21k (14,197,122 images, 21,843 classes) is not among TFDS's public data sets: prepare it
under the name imagenet21k with one split, full, or keep it as folders and set --config.data.source,
train_split and data_dir. The paper names neither its loss nor its held-out images; this config
takes softmax, and holds out the first 51,200 images, as AugReg does. It clips gradients at norm 1
as AugReg does, too; the paper names that for ImageNet alone.
"""

from vit_dist.config import get_defaults
from vit_dist.config.recipe import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, model=("B/16", "B/32", "L/16", "L/32"), epochs=90.0)
    config = get_defaults()
    config.image_size = 224
    config.total_epochs = arg.epochs
    config.data.source, config.data.name = "tfds", "imagenet21k"
    config.data.train_split = "full[51200:]"
    config.data.val_split, config.data.test_split = "full[25600:51200]", "full[:25600]"

    config.input.batch_size = 4096
    config.input.train_ops = "decode_jpeg_and_inception_crop(size)|flip_lr|value_range(-1, 1)"
    config.input.eval_ops = "decode|resize_small(256)|central_crop(size)|value_range(-1, 1)"

    config.model.variant = arg.model
    config.model.pool = "tok"
    # A representation layer as wide as the model, as in the paper's pretraining.
    config.model.rep_size = -1
    config.model.dropout = 0.1

    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.03
    config.schedule.name = "linear"
    config.schedule.warmup_steps = 10_000
    config.step.clip_norm = 1.0
    return config
