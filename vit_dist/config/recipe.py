"""What the recipes in configs/ share: their argument, ImageNet's splits and further test sets,
fine-tuning schedules.
"""

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from vit_dist.config.binding import did_you_mean
from vit_dist.config.errors import ConfigError

# As TFDS publishes it: 1,281,167 training and 50,000 validation images of 1000 classes. Choices are
# made on the last percent of the training images; papers report on "validation", here "test".
IMAGENET = {
    "source": "tfds",
    "name": "imagenet2012",
    "train_split": "train[:99%]",
    "val_split": "train[99%:]",
    "test_split": "validation",
}
# Test sets for a model of ImageNet's classes, as TFDS publishes them: name of an evaluation -> what
# config.evals takes. TFDS labels the 200 classes of -A and -R as those of all 1000; published
# accuracies choose among the 200.
IMAGENET_SETS: dict[str, dict[str, Any]] = {
    "imagenet_v2": {"data": {"name": "imagenet_v2/matched-frequency"}, "split": "test"},
    "imagenet_a": {"data": {"name": "imagenet_a"}, "split": "test", "classes": "present"},
    "imagenet_r": {"data": {"name": "imagenet_r"}, "split": "test", "classes": "present"},
    "imagenet_sketch": {"data": {"name": "imagenet_sketch"}, "split": "test"},
    "imagenet_real": {
        "kind": "real",
        "data": {"name": "imagenet2012_real", "label_key": "real_label"},
        "split": "validation",
    },
}
# ImageNet-C's corruptions (arXiv 1903.12261), each with AlexNet's top-1 error, the mean over the
# severities, by which mCE divides: as AugMix's imagenet.py has them, from hendrycks/robustness.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = (1, 2, 3, 4, 5)
# Fine-tuning as in vision_transformer and big_vision. Data set -> steps, steps of warmup, and the
# splits for training, choosing and testing.
TRANSFER_TASKS = {
    "imagenet2012": (20_000, 500, "train[:99%]", "train[99%:]", "validation"),
    "cifar10": (10_000, 500, "train[:98%]", "train[98%:]", "test"),
    "cifar100": (10_000, 500, "train[:98%]", "train[98%:]", "test"),
    "oxford_iiit_pet": (500, 100, "train[:90%]", "train[90%:]", "test"),
    "oxford_flowers102": (500, 100, "train[:90%]", "train[90%:]", "test"),
}


def parse_arg(arg: str | None, **defaults: Any) -> SimpleNamespace:
    """The argument of `get_config`: "model=B/16,aug=medium1" over `defaults`.

    Args:
      arg: comma-separated key=value; a value without a key is that of the first key in `defaults`.
        None for no argument.
      **defaults: key -> default, or -> a tuple of the allowed values, the default first. A value is
        converted to its default's type. An allowed value that ends in a colon allows every value
        that begins with it.

    Returns:
      The values as attributes, by key.

    Raises:
      ConfigError: an unknown key or value; says which ones are allowed.
    """
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in defaults.items()}
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = next(iter(defaults)), part
        _check_known(key, defaults, "the recipe has no argument")
        # The default's type converts the text: int("300") for an int.
        try:
            values[key] = type(values[key])(value)
        except ValueError:
            kind = type(values[key]).__name__
            raise ConfigError(f"the recipe's {key} must be {kind}, got {value!r}") from None
        allowed = defaults[key]
        if isinstance(allowed, tuple) and not _is_one_of(values[key], allowed):
            shown = ", ".join(map(str, allowed))
            raise ConfigError(f"the recipe's {key} {value!r} is unknown; allowed: {shown}")
    return SimpleNamespace(**values)


def _is_one_of(value: Any, allowed: tuple) -> bool:
    beginnings = [a for a in allowed if isinstance(a, str) and a.endswith(":")]
    return value in allowed or any(value.startswith(a) for a in beginnings)


def use_imagenet(config: ConfigDict) -> None:
    """Sets the data section for ImageNet-1k through TFDS, with a percent held out of training."""
    config.data.update(IMAGENET)


def use_all_of_imagenet(config: ConfigDict) -> None:
    """Sets the data section for ImageNet-1k as DeiT uses it: all training images are trained on,
    and the validation images are evaluated on.
    """
    use_imagenet(config)
    config.data.train_split = "train"
    config.data.val_split, config.data.test_split = "validation", ""


def imagenet_sets(*names: str, every: int = 0, **data: Any) -> dict[str, Any]:
    """What config.evals takes for some of IMAGENET_SETS.

    Args:
      *names: which; none for all.
      every: steps between two evaluations of a training; 0 for at its end alone.
      **data: further keys of config.data, such as data_dir.

    Raises:
      ConfigError: an unknown name.
    """
    found = {}
    for name in names or IMAGENET_SETS:
        _check_known(name, IMAGENET_SETS, "ImageNet's further test sets have no")
        entry = IMAGENET_SETS[name]
        keys = {"source": "tfds", "train_split": "", **data, **entry["data"]}
        found[name] = {"kind": "classification", **entry, "every": every, "data": keys}
    return found


def imagenet_c(
    ops: str,
    *,
    folder: str = "",
    every: int = 0,
    corruptions: Sequence[str] = tuple(ALEXNET_ERRORS),
    **data: Any,
) -> dict[str, Any]:
    """What config.evals takes for ImageNet-C: each corruption and severity, and all: "imagenet_c".

    Args:
      ops: the pipe. The images are crops of 224 pixels already: it decodes, resizes and scales.
      folder: of the published files, FOLDER/CORRUPTION/SEVERITY/CLASS/*.JPEG; "" for TFDS.
      every: steps between two evaluations of a training; 0 for at its end alone.
      corruptions: some of ALEXNET_ERRORS.
      **data: further keys of config.data, such as data_dir of TFDS.

    Raises:
      ConfigError: an unknown corruption.
    """
    found: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    for corruption in corruptions:
        _check_known(corruption, ALEXNET_ERRORS, "ImageNet-C has no")
        for severity in SEVERITIES:
            name = f"c_{corruption}_{severity}"
            if folder:
                split, keys = str(severity), {"source": "folder"}
                keys["data_dir"] = f"{folder}/{corruption}"
            else:
                split, keys = "validation", {"source": "tfds"}
                keys["name"] = f"imagenet2012_corrupted/{corruption}_{severity}"
            found[name] = {
                "kind": "classification",
                "split": split,
                "data": {**keys, "train_split": "", **data},
                "ops": ops,
                "every": every,
                # What is not averaged is left out: fitting 75 temperatures takes minutes.
                "options": {"top": (1,), "temperature": False},
            }
            groups.setdefault(corruption, []).append(name)
    baseline = {corruption: ALEXNET_ERRORS[corruption] for corruption in corruptions}
    average = {"of": groups, "baseline": baseline}
    found["imagenet_c"] = {"kind": "corruption_error", "every": every, "options": average}
    return found


def _check_known(name: str, known: Collection[str], refusal: str) -> None:
    if name not in known:
        near = did_you_mean(name, known)
        raise ConfigError(f"{refusal} {name!r}{near}; there are: {', '.join(known)}")


def use_transfer_data(config: ConfigDict, dataset: str) -> None:
    """Sets the data section for one of TRANSFER_TASKS, through TFDS."""
    _, _, train, val, test = TRANSFER_TASKS[dataset]
    config.data.source, config.data.name = "tfds", dataset
    config.data.train_split, config.data.val_split, config.data.test_split = train, val, test


def use_vision_transformer(config: ConfigDict, *, dataset: str, scale: str) -> None:
    """Fine-tuning as vision_transformer has it: its README, configs/common.py, input_pipeline.py.

    Args:
      config: its model.variant is set already.
      dataset: one of TRANSFER_TASKS; any other data set gets the shortest of their schedules.
      scale: the op that scales images.
    """
    config.total_steps, config.schedule.warmup_steps = TRANSFER_TASKS.get(dataset, (500, 100))[:2]
    config.input.batch_size = 512
    # ImageNet's are large JPEGs, of which only the crop's window is decoded. The small images of
    # the other sets are decoded whole; the crop is drawn in the same way.
    crop = "inception_crop(size)"
    crop = f"decode_jpeg_and_{crop}" if dataset == "imagenet2012" else f"decode|{crop}"
    config.input.train_ops = f"{crop}|flip_lr|{scale}"
    config.input.eval_ops = f"decode|resize(size)|{scale}"
    config.optimizer.name, config.optimizer.weight_decay = "sgd", 0.0
    config.optimizer.momentum, config.optimizer.momentum_dtype = 0.9, "bfloat16"
    slow = dataset == "imagenet2012" and config.model.variant in ("B/32", "S/32", "L/16")
    config.optimizer.learning_rate = 0.01 if slow or dataset == "cifar10" else 0.03
    config.step.clip_norm = 1.0
    config.step.accumulation = 8


def use_deit_finetuning(config: ConfigDict, *, generation: int, scale: str) -> None:
    """Fine-tuning at a higher resolution as DeiT has it: its README, README_revenge, main.py.

    Args:
      config: its model.variant and image_size are set already.
      generation: 1 (arXiv 2012.12877, B at 384) or 3 (2204.07118).
      scale: the op that scales images.
    """
    first, size = generation == 1, config.image_size
    config.precision = "bfloat16"
    config.posemb_method = "bicubic"
    config.total_epochs = 30.0 if first else 20.0
    config.input.batch_size = 512
    config.input.repeats = 3 if first else 1
    crop = "decode_jpeg_and_inception_crop(size, area_min=8, method='bicubic', antialias=True)"
    erasing = "|random_erasing(0.25)" if first else ""
    config.input.train_ops = (
        f"{crop}|flip_lr|rand_augment_timm('rand-m9-mstd0.5-inc1'){erasing}|{scale}"
    )
    # DeiT evaluates on the central 7/8 of an enlarged image, DeiT III on the whole image.
    larger = int(size / 0.875) if first else size
    config.input.eval_ops = (
        f"decode|resize_small({larger}, 'bicubic', True)|central_crop(size)|{scale}"
    )
    config.mixing.mixup_alpha, config.mixing.cutmix_alpha = 0.8, 1.0
    config.model.drop_path = 0.1
    # DeiT III has one rate for all blocks, by size of the model.
    if not first:
        config.model.drop_path = {"S/16": 0.0, "B/16": 0.15}.get(config.model.variant, 0.0)
        config.model.drop_path_growth = "constant"
    config.loss.label_smoothing = 0.1
    peak = 5e-6 if first else 1e-5
    config.optimizer.learning_rate, config.optimizer.weight_decay = peak, 1e-8 if first else 0.1
    # As timm: a constant rate in each epoch of the warmup, from 1e-6; then the peak to the end.
    config.schedule.warmup_epochs, config.schedule.hold_epochs = 5.0, 1.0
    config.schedule.decay_from = "start"
    config.schedule.start_factor, config.schedule.end_factor = 1e-6 / peak, 1.0
    config.step.clip_norm = None
    config.step.ema_decay = 0.99996
