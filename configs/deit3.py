"""DeiT III, ViT-S/16 and ViT-B/16 on ImageNet-1k alone (arXiv 2204.07118).

    python -m vit_dist.train --config configs/deit3.py:B/16 --workdir runs/deit3_b \
        --config.data.data_dir=/data/tfds
    python -m vit_dist.train --config configs/deit3.py:B/16,stage=224 --workdir runs/deit3_b_224 \
        --config.init_from=runs/deit3_b --config.data.data_dir=/data/tfds

| Argument            | Steps   | Hours | Published |
|---------------------|---------|-------|-----------|
| `:S/16`             | 500,000 | 14    | 81.4 %    |
| `:S/16,stage=384`   | 50,040  | 1.2   | 83.4 %    |
| `:B/16`             | 500,000 | 40    | -         |
| `:B/16,stage=224`   | 50,040  | 1.4   | 83.8 %    |
| `:B/16,stage=384`   | 50,040  | 4.3   | 85.0 %    |

Hardware: TPU v5e-8, or 8 GPUs; the published runs took 8 V100s and 8 or 16 for fine-tuning.
What it takes of a v5e-8 and a v5p-8, compiled: docs/tpu.md. Images that an A100 or H100 takes at a
time: docs/gpu.md, estimated.
Hours: not measured: 6 x multiply-adds of the forward pass, at 35 % of 8 x 197 TFLOP/s.
Published: top-1 on ImageNet's validation set, README_revenge of facebookresearch/deit. Not run
here.

S/16 trains at 224 px, B/16 at 192 px and then at 224; training at 384 px begins from the weights of
224 px (--config.init_from). 800 epochs are 800 x 625 steps, because the reference drops the
incomplete batch at the end of each epoch. What differs from the reference: initial weights are
vision_transformer's; the cls token has a position of its own; activations are bfloat16 instead of
float16; the learning rate is not one epoch late; and the moving average is evaluated, where the
reference reports the weights themselves.
"""

from vit_dist.config import get_defaults
from vit_dist.config.recipe import parse_arg, use_all_of_imagenet

# (model, stage) -> stochastic depth, the same in all blocks; a pair that is missing is no stage.
DROP_PATH = {
    ("S/16", "pretrain"): 0.05,
    ("S/16", "384"): 0.0,
    ("B/16", "pretrain"): 0.2,
    ("B/16", "224"): 0.2,
    ("B/16", "384"): 0.15,
}
CROP = "decode_jpeg_and_inception_crop(size, area_min=8, method='bicubic', antialias=True)|flip_lr"


def get_config(arg=None):
    arg = parse_arg(arg, model=("S/16", "B/16"), stage=("pretrain", "224", "384"))
    if (arg.model, arg.stage) not in DROP_PATH:
        raise ValueError("S/16 trains at 224 px already: use :S/16 or :S/16,stage=384")
    config = get_defaults()
    config.precision = "bfloat16"
    use_all_of_imagenet(config)
    config.posemb_method = "bicubic"
    config.mixing.mixup_alpha = 0.8
    config.mixing.cutmix_alpha = 1.0

    config.model.variant = arg.model
    config.model.pool = "tok"
    config.model.gelu = "erf"
    config.model.layer_scale = 1e-4
    config.model.drop_path = DROP_PATH[arg.model, arg.stage]
    config.model.drop_path_growth = "constant"
    config.step.ema_decay = 0.99996
    config.schedule.decay_from = "start"
    if arg.stage == "pretrain":
        _pretrain(config, arg.model)
    else:
        _finetune(config, int(arg.stage))
    config.input.eval_ops = (
        f"decode|resize_small({config.image_size}, 'bicubic', True)|central_crop(size)"
        "|normalize('imagenet')"
    )
    return config


def _pretrain(config, model):
    config.image_size = 224 if model == "S/16" else 192
    config.total_steps = 800 * 625
    config.input.batch_size = 2048
    config.input.repeats = 3
    config.input.train_ops = (
        f"{CROP}|three_augment()|color_jitter(0.3, 0.3, 0.3)|normalize('imagenet')"
    )
    # Binary cross-entropy, mean over the classes; each of two mixed labels counts in full.
    config.loss.name = "sigmoid"
    config.loss.reduction = "mean"
    config.loss.threshold = 0.0

    peak = 4e-3 if model == "S/16" else 3e-3
    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = peak
    config.optimizer.weight_decay = 0.05
    config.optimizer.epsilon = 1e-8
    # Apex's FusedLAMB, which the reference takes, clips to a norm of 1 by itself.
    config.step.clip_norm = 1.0
    _set_schedule(config, peak, epoch=625)


def _finetune(config, size):
    config.image_size = size
    config.total_steps = 20 * 2502
    config.input.batch_size = 512
    config.input.train_ops = (
        f"{CROP}|rand_augment_timm('rand-m9-mstd0.5-inc1')|normalize('imagenet')"
    )
    config.loss.label_smoothing = 0.1
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.1
    config.step.clip_norm = None
    _set_schedule(config, 1e-5, epoch=2502)


def _set_schedule(config, peak, *, epoch):
    # As timm: the rate is constant within an epoch, and the cosine begins with the warmup.
    config.schedule.warmup_steps = 5 * epoch
    config.schedule.hold_steps = epoch
    config.schedule.start_factor = 1e-6 / peak
    config.schedule.end_factor = 1e-5 / peak
