"""AugReg, "How to train your ViT?" (arXiv 2106.10270): 300 epochs of ImageNet-21k or ImageNet-1k.

    python -m vit_dist.train --config configs/augreg.py:data=i21k,model=B/16 \
        --workdir runs/augreg_b16_i21k --config.data.data_dir=/data/tfds
    python -m vit_dist.train --config configs/augreg.py:data=i1k,model=B/16,aug=medium1 \
        --workdir runs/augreg_b16_i1k --config.data.data_dir=/data/tfds

Models: Ti/16, S/32, S/16, B/32, B/16, L/16. By default the augmentation (`aug`) and the weight
decay (`decay`, which is multiplied by the learning rate) are those of the published checkpoint for
i21k, and those of big_vision's config for i1k. Levels of augmentation: none, light1, light2,
medium1, medium2, strong1, strong2.

| Argument                | Default level     | Steps     | Hours | Published |
|-------------------------|-------------------|-----------|-------|-----------|
| `:data=i21k,model=Ti/16` | none, decay 0.03  | 1,036,078 | 16    | 78.22 %   |
| `:data=i21k,model=S/32`  | none, decay 0.1   | 1,036,078 | 15    | 79.58 %   |
| `:data=i21k,model=S/16`  | light1, decay 0.03 | 1,036,078 | 59   | 83.73 %   |
| `:data=i21k,model=B/32`  | light1, decay 0.1 | 1,036,078 | 57    | 83.59 %   |
| `:data=i21k,model=B/16`  | medium1, decay 0.1 | 1,036,078 | 225  | 85.49 %   |
| `:data=i21k,model=L/16`  | strong1, decay 0.1 | 1,036,078 | 790  | 85.59 %   |
| `:data=i1k,model=Ti/16`  | light1, decay 0.1 | 92,897    | 1.4   | -         |
| `:data=i1k,model=S/32`   | medium1, decay 0.1 | 92,897   | 1.3   | -         |
| `:data=i1k,model=S/16`   | medium2, decay 0.1 | 92,897   | 5.3   | 81.13 %   |
| `:data=i1k,model=B/32`   | medium2, decay 0.1 | 92,897   | 5.1   | 78.75 %   |
| `:data=i1k,model=B/16`   | medium2, decay 0.1 | 92,897   | 20    | 81.10 %   |
| `:data=i1k,model=L/16`   | medium2, decay 0.1 | 92,897   | 71    | -         |

Hardware: TPU v5e-8; where memory is short, --config.step.accumulation or --config.model.remat.
What it takes of a v5e-8 and a v5p-8, compiled: docs/tpu.md. Images that an A100 or H100 takes at a
time: docs/gpu.md, estimated.
Hours: not measured: 6 x multiply-adds of the forward pass, at 35 % of 8 x 197 TFLOP/s.
Published: top-1 on ImageNet's validation set after fine-tuning at 384 px (configs/finetune_384.py);
i21k from vision_transformer's table of checkpoints, i1k from timm's evaluation of the authors'
checkpoints. Not run here.

ImageNet-21k (14,197,122 images, 21,843 classes) is not among TFDS's public data sets: prepare it
under the name imagenet21k with one split, full, or keep it as folders and set --config.data.source,
train_split and data_dir. Its first 51,200 images are for testing and choosing.
"""

from vit_dist.config import get_defaults
from vit_dist.config.recipe import parse_arg, use_imagenet

# Level -> (n, m) of RandAugment, alpha of mixup. Magnitude m = 0 is not the same as none: several
# operations, such as Invert and Equalize, have no magnitude.
LEVELS = {
    "none": (None, 0.0),
    "light1": ((2, 0), 0.0),
    "light2": ((2, 10), 0.2),
    "medium1": ((2, 15), 0.2),
    "medium2": ((2, 15), 0.5),
    "strong1": ((2, 20), 0.5),
    "strong2": ((2, 20), 0.8),
}
# (data, model) -> level, weight decay.
CHOSEN = {
    ("i21k", "Ti/16"): ("none", 0.03),
    ("i21k", "S/32"): ("none", 0.1),
    ("i21k", "S/16"): ("light1", 0.03),
    ("i21k", "B/32"): ("light1", 0.1),
    ("i21k", "B/16"): ("medium1", 0.1),
    ("i21k", "L/16"): ("strong1", 0.1),
    ("i1k", "Ti/16"): ("light1", 0.1),
    ("i1k", "S/32"): ("medium1", 0.1),
    ("i1k", "S/16"): ("medium2", 0.1),
    ("i1k", "B/32"): ("medium2", 0.1),
    ("i1k", "B/16"): ("medium2", 0.1),
    ("i1k", "L/16"): ("medium2", 0.1),
}
MODELS = ("B/16", "Ti/16", "S/32", "S/16", "B/32", "L/16")


def get_config(arg=None):
    arg = parse_arg(
        arg, model=MODELS, data=("i21k", "i1k"), aug=("", *LEVELS), decay=0.0, epochs=300.0
    )
    level, decay = CHOSEN[arg.data, arg.model]
    randaug, mixup = LEVELS[arg.aug or level]
    config = get_defaults()
    config.image_size = 224
    config.total_epochs = arg.epochs
    # ImageNet-21k has no split to test on: its first images are kept out of training.
    if arg.data == "i1k":
        use_imagenet(config)
    else:
        config.data.source, config.data.name = "tfds", "imagenet21k"
        config.data.train_split = "full[51200:]"
        config.data.val_split, config.data.test_split = "full[25600:51200]", "full[:25600]"

    config.input.batch_size = 4096
    ops = ["decode_jpeg_and_inception_crop(size)", "flip_lr"]
    ops += [f"randaug({randaug[0]}, {randaug[1]})"] if randaug else []
    config.input.train_ops = "|".join([*ops, "value_range(-1, 1)"])
    config.input.eval_ops = "decode|resize_small(256)|central_crop(size)|value_range(-1, 1)"
    # As in big_vision the larger share of a mixture goes to the example itself.
    config.mixing.mixup_alpha = mixup
    config.mixing.fold_lambda = True

    config.model.variant = arg.model
    config.model.pool = "tok"
    config.model.rep_size = -1 if arg.data == "i1k" else 0
    # The bias of a sigmoid is -log(number of classes), so that a new head expects one label in all.
    config.model.head_bias = -6.9 if arg.data == "i1k" else -10.0
    config.loss.name = "sigmoid"

    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = arg.decay or decay
    config.optimizer.momentum_dtype = "bfloat16"
    config.schedule.warmup_steps = 10_000
    config.step.clip_norm = 1.0
    return config
