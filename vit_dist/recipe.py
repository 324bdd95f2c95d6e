"""What recipes in configs/ share: the argument behind the colon, and ImageNet's splits."""

from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from vit_dist.binding import did_you_mean

# Published with TFDS: 1,281,167 training and 50,000 validation images of 1000 classes. The last
# percent of the training images is for choosing; what papers report is validation, here "test".
IMAGENET = {
    "source": "tfds",
    "name": "imagenet2012",
    "train_split": "train[:99%]",
    "val_split": "train[99%:]",
    "test_split": "validation",
}
# Fine-tuning as vision_transformer and big_vision have it: steps, warmup, training share, held-out
# share, test split.
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
      arg: comma-separated key=value; a value alone is that of the first default. None for none.
      **defaults: key -> value, or a tuple of the values allowed, of which the first is the default.
        A value is read as its default's type.

    Raises:
      ValueError: an unknown key or value; says which there are.
    """
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in defaults.items()}
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = next(iter(defaults)), part
        if key not in defaults:
            raise ValueError(
                f"the recipe has no argument {key!r}{did_you_mean(key, defaults)} "
                f"There are: {', '.join(defaults)}"
            )
        try:
            values[key] = type(values[key])(value)
        except ValueError:
            kind = type(values[key]).__name__
            raise ValueError(f"the recipe's {key} must be {kind}, got {value!r}") from None
        allowed = defaults[key]
        if isinstance(allowed, tuple) and values[key] not in allowed:
            shown = ", ".join(map(str, allowed))
            raise ValueError(f"the recipe's {key} {value!r} is unknown; allowed: {shown}")
    return SimpleNamespace(**values)


def use_imagenet(config: ConfigDict) -> None:
    """Sets the data section for ImageNet-1k through TFDS, with a percent held out of training."""
    config.data.update(IMAGENET)


def use_all_of_imagenet(config: ConfigDict) -> None:
    """The same with every training image, and validation to evaluate on, as DeiT has it."""
    use_imagenet(config)
    config.data.train_split = "train"
    config.data.val_split, config.data.test_split = "validation", ""
