"""DeiT-S/16 and DeiT-B/16 on ImageNet-1k, without distillation (arXiv 2012.12877).

    python -m vit_dist.train --config configs/deit.py:S/16 --workdir runs/deit_s \
        --config.data.data_dir=/data/tfds
    python -m vit_dist.train --config configs/deit.py:B/16,stage=384 --workdir runs/deit_b_384 \
        --config.init_from=runs/deit_b --config.data.data_dir=/data/tfds

| Argument            | Steps   | Hours | Published |
|---------------------|---------|-------|-----------|
| `:S/16`             | 375,300 | 5.3   | 79.9 %    |
| `:B/16`             | 375,300 | 20    | 81.8 %    |
| `:B/16,stage=384`   | 75,060  | 6.4   | 82.9 %    |

Hardware: TPU v5e-8, or 8 GPUs; the published runs took 4 and 16 V100s.
What it takes of a v5e-8 and a v5p-8, compiled: docs/tpu.md. Images that an A100 or H100 takes at a
time: docs/gpu.md, estimated.
Hours: not measured: 6 x multiply-adds of the forward pass, at 35 % of 8 x 197 TFLOP/s.
Published: top-1 on ImageNet's validation set, README of facebookresearch/deit. Not run here.

300 epochs are 300 x 1251 steps, because the reference drops the incomplete batch at the end of each
epoch. With repeated augmentation such an epoch shows a third of the images three times each. What
differs from the reference: initial weights are vision_transformer's; activations are bfloat16
instead of float16; the learning rate is not one epoch late; and the moving average is evaluated,
where the reference reports the weights themselves.
"""

from vit_dist.config import get_defaults
from vit_dist.config.recipe import parse_arg, use_all_of_imagenet

# Steps: 1,281,167 images in batches of 1024. Fine-tuning has batches of half the size.
EPOCH = 1251


def get_config(arg=None):
    arg = parse_arg(arg, model=("S/16", "B/16"), stage=("224", "384"))
    finetune = arg.stage == "384"
    config = get_defaults()
    config.image_size = int(arg.stage)
    config.precision = "bfloat16"
    use_all_of_imagenet(config)
    epoch = 2 * EPOCH if finetune else EPOCH
    config.total_steps = (30 if finetune else 300) * epoch
    config.posemb_method = "bicubic"

    # Repeated augmentation: each image is three times in a batch.
    config.input.batch_size = 512 if finetune else 1024
    config.input.repeats = 3
    config.input.train_ops = (
        "decode_jpeg_and_inception_crop(size, area_min=8, method='bicubic', antialias=True)|flip_lr"
        "|rand_augment_timm('rand-m9-mstd0.5-inc1')|random_erasing(0.25)|normalize('imagenet')"
    )
    # Evaluation crops the central 7/8 of the enlarged image.
    resized = int(config.image_size / 0.875)
    config.input.eval_ops = (
        f"decode|resize_small({resized}, 'bicubic', True)|central_crop(size)|normalize('imagenet')"
    )
    config.mixing.mixup_alpha = 0.8
    config.mixing.cutmix_alpha = 1.0

    config.model.variant = arg.model
    config.model.pool = "tok"
    config.model.gelu = "erf"
    config.model.drop_path = 0.1
    config.loss.label_smoothing = 0.1

    # The reference gives 5e-4 for a batch of 512 and scales it by the batch size.
    peak = 5e-6 if finetune else 5e-4 * 1024 / 512
    end = 5e-6 if finetune else 1e-5
    config.optimizer.learning_rate = peak
    config.optimizer.weight_decay = 1e-8 if finetune else 0.05
    # As timm: the rate is constant within an epoch, and the cosine begins with the warmup.
    config.schedule.warmup_steps = 5 * epoch
    config.schedule.hold_steps = epoch
    config.schedule.decay_from = "start"
    config.schedule.start_factor = 1e-6 / peak
    config.schedule.end_factor = end / peak
    config.step.clip_norm = None
    config.step.ema_decay = 0.99996
    return config
