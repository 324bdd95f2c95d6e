"""Fine-tunes a pretrained ViT of any origin on a data set or a folder of images, in one command.

    python -m vit_dist.train --config configs/transfer.py:model=B/16,dataset=cifar10,res=384 \
        --workdir runs/cifar10 --config.init_from=B_16.npz --config.data.data_dir=/data/tfds

    python -m vit_dist.train --workdir runs/mine \
        --config configs/transfer.py:model=S/16,weights=timm,dataset=folder:/data/mine \
        --config.init_from=hf://timm/vit_small_patch16_224.augreg_in21k

`dataset` is cifar10, cifar100, oxford_iiit_pet, oxford_flowers102, imagenet2012 (through TFDS), or
folder:PATH, or folder with --config.data.data_dir=PATH.

`weights` says where the weights are from, which decides GELU, LayerNorm's epsilon, pooling and
scaling of images: vision_transformer (.npz), big_vision (S/16 of arXiv 2205.01580), timm, deit,
deit3, dinov2, huggingface (ViT), ours. If a network still differs from its file, config.init_from
refuses it and names the flags to set.

`recipe`:

| Recipe               | Whose                             | Batch, optimizer, peak          |
|----------------------|-----------------------------------|---------------------------------|
| `vision_transformer` | its README; so finetune_384.py    | 512, SGD, 0.03 (CIFAR-10: 0.01) |
| `big_vision`         | its configs/transfer.py           | 512, SGD, 0.01                  |
| `deit`               | arXiv 2012.12877, B/16 at 384     | 512, AdamW, 5e-6, 30 epochs     |
| `deit3`              | arXiv 2204.07118, S/16, B/16, 384 | 512, AdamW, 1e-5, 20 epochs     |
| `linear`             | ours: the head alone trains       | 256, SGD, 0.1, 50 epochs        |
| `folder`             | ours: a small set of one's own    | 32, AdamW, 1e-4, 30 epochs      |

The default is big_vision, and folder where dataset is. Of a folder, photos are turned upright as
their EXIF orientation says, and what is transparent is laid over white, whatever the recipe. deit
and deit3 are for ImageNet, from the same weights at a lower resolution (`weights=deit`, `deit3`):
their rates are too low for a new head. Their numbers are those of the README of
facebookresearch/deit, as in configs/deit.py and deit3.py, which count steps as the reference does
and train on all of ImageNet.

Hardware: as for configs/finetune_384.py; `folder` with Ti/16 or S/16 is for one GPU, or slow on a
CPU.
Published, not run here (big_vision, B/32 of AugReg at 384, with its best rate for each, to be set
by --config.optimizer.learning_rate): ImageNet 83.27 % at 0.03, CIFAR-10 98.55 % at 0.003, CIFAR-100
91.35 % at 0.01, Pets 93.78 % at 0.003, Flowers 99.43 % at 0.003. Measured here: nothing but that it
trains.
"""

import re

from vit_dist.config import get_defaults
from vit_dist.config.recipe import (
    TRANSFER_TASKS,
    parse_arg,
    use_deit_finetuning,
    use_transfer_data,
    use_vision_transformer,
)

# `weights` -> the settings of config.model that such weights need, and the op that scales images.
MINUS_ONE_TO_ONE, IMAGENET = "value_range(-1, 1)", "normalize('imagenet')"
WEIGHTS = {
    "vision_transformer": ({"pool": "tok"}, MINUS_ONE_TO_ONE),
    "big_vision": ({"pool": "gap", "posemb": "sincos2d", "rep_size": -1}, MINUS_ONE_TO_ONE),
    # For timm's augreg models; for its other models take deit.
    "timm": ({"pool": "tok", "gelu": "erf"}, MINUS_ONE_TO_ONE),
    "deit": ({"pool": "tok", "gelu": "erf"}, IMAGENET),
    "deit3": (
        {"pool": "tok", "gelu": "erf", "prefix_posemb": "none", "layer_scale": 1e-4},
        IMAGENET,
    ),
    "dinov2": ({"pool": "tok_gap", "gelu": "erf", "layer_scale": 1e-5}, IMAGENET),
    "huggingface": ({"pool": "tok", "gelu": "erf", "norm_epsilon": 1e-12}, MINUS_ONE_TO_ONE),
    "ours": ({}, MINUS_ONE_TO_ONE),
}
RECIPES = ("", "vision_transformer", "big_vision", "deit", "deit3", "linear", "folder")


def get_config(arg=None):
    arg = parse_arg(
        arg,
        model="B/16",
        dataset=(*dict.fromkeys(("cifar10", *TRANSFER_TASKS)), "folder", "folder:"),
        res=384,
        weights=tuple(WEIGHTS),
        recipe=RECIPES,
    )
    config = get_defaults()
    config.image_size = arg.res
    config.model.variant = arg.model
    settings, scale = WEIGHTS[arg.weights]
    config.model.update(settings)
    # How each system resamples position embeddings; vision_transformer's way is the default.
    if arg.weights not in ("vision_transformer", "big_vision", "ours"):
        config.posemb_method = "bicubic" if arg.weights == "dinov2" else "bicubic_antialias"
    arg.dataset, _, folder = arg.dataset.partition(":")
    if arg.dataset == "folder":
        config.data.source, config.data.test_split = "folder", ""
        config.data.data_dir = folder or None
    else:
        use_transfer_data(config, arg.dataset)
    recipe = arg.recipe or ("folder" if arg.dataset == "folder" else "big_vision")
    if recipe == "vision_transformer":
        use_vision_transformer(config, dataset=arg.dataset, scale=scale)
    elif recipe in ("deit", "deit3"):
        use_deit_finetuning(config, generation=3 if recipe == "deit3" else 1, scale=scale)
    else:
        _set_pipes(config, arg, scale)
        _set_recipe(config, recipe, arg.dataset)
    if arg.dataset == "folder":
        for key in ("train_ops", "eval_ops"):
            config.input[key] = _of_photos(config.input[key])
    return config


def _of_photos(ops):
    """Images of one's own are turned upright, and laid over white where they are transparent."""
    options = "exif=True, background=255"
    fused = "decode_jpeg_and_inception_crop(size, "
    ops = ops.replace(fused, f"{fused}{options}, ")
    return re.sub(r"^decode\|", f"decode({options})|", ops)


def _set_pipes(config, arg, scale):
    # 448 for 384: images are enlarged by 7/6 before a crop.
    larger = arg.res * 7 // 6
    crop = "inception_crop(size)"
    # In CIFAR's small images the object fills the whole image: no crop may lose much of it.
    if arg.dataset in ("cifar10", "cifar100"):
        crop = f"resize_small({larger})|random_crop(size)"
    elif arg.dataset == "folder":
        crop = "inception_crop(size, area_min=30)"
    config.input.train_ops = f"decode|{crop}|flip_lr|{scale}"
    config.input.eval_ops = f"decode|resize_small({larger})|central_crop(size)|{scale}"


def _set_recipe(config, recipe, dataset):
    config.step.clip_norm = 1.0
    if recipe == "big_vision":
        steps, warmup = TRANSFER_TASKS.get(dataset, (500, 100))[:2]
        config.total_steps, config.schedule.warmup_steps = steps, warmup
        config.input.batch_size = 512
        config.optimizer.name, config.optimizer.weight_decay = "sgd", 0.0
        config.optimizer.momentum, config.optimizer.momentum_dtype = 0.9, "bfloat16"
        config.optimizer.learning_rate = 0.01
    elif recipe == "linear":
        config.total_epochs = 50.0
        config.input.batch_size = 256
        config.optimizer.name, config.optimizer.weight_decay = "sgd", 0.0
        config.optimizer.learning_rate = 0.1
        # The second pattern matches every name that the first does not, and freezes it.
        config.optimizer.lr_multipliers = (("^head/", 1.0), (".", 0.0))
    else:
        config.total_epochs, config.schedule.warmup_percent = 30.0, 10.0
        config.input.batch_size = config.input.eval_batch_size = 32
        config.optimizer.learning_rate, config.optimizer.weight_decay = 1e-4, 0.05
        config.optimizer.layer_decay = 0.75
        config.loss.label_smoothing = 0.1
        config.save_percent = 20.0
