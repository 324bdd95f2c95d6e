"""A ViT-Ti/16 from scratch on your own folder of images: a starting point, not a published recipe.

    python -m vit_dist.train --config configs/folder.py --workdir runs/mine \
        --config.data.data_dir=/data/mine

The config takes another model as its argument: --config configs/folder.py:S/16

Hardware: one GPU; a CPU is enough to try it.

Photos are turned upright as their EXIF orientation says, and what is transparent is laid over
white. Light augmentation, cosine schedule, moving average. A ViT trained from scratch wants many
images (tens of thousands and more); with fewer, fine-tune a pretrained one: --config.init_from=RUN.
"""

from vit_dist.config import get_defaults


def get_config(arg: str = "Ti/16"):
    config = get_defaults()
    config.image_size = 224
    config.precision = "bfloat16"
    config.total_epochs = 100.0

    config.data.source = "folder"
    config.data.val_split = "val"
    # Set it to "test" if there is such a folder, or set test_fraction.
    config.data.test_split = ""
    config.input.batch_size = 128
    config.input.eval_batch_size = 128
    config.input.train_ops = (
        "decode_jpeg_and_inception_crop(size, area_min=20, exif=True, background=255)|flip_lr"
        "|value_range(-1, 1)"
    )
    config.input.eval_ops = (
        "decode(exif=True, background=255)|resize(size, antialias=True)|value_range(-1, 1)"
    )

    config.model.variant = arg
    config.model.dropout = 0.1
    config.loss.label_smoothing = 0.1
    config.optimizer.learning_rate = 5e-4
    config.schedule.warmup_percent = 5.0
    config.step.ema_decay = 0.999
    return config
