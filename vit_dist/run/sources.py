"""From a config to the opened sources of a run's splits."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from vit_dist.config.errors import ConfigError
from vit_dist.data.damage import POLICIES
from vit_dist.data.service import parse_addresses
from vit_dist.data.sources.cache import FORMS, CachedSource
from vit_dist.data.sources.open import open_source
from vit_dist.data.sources.source import Source

SPLITS = ("train", "val", "test")


def check_input(config: ConfigDict) -> None:
    """Checks config.input but for the pipes; opens nothing.

    Raises:
      ValueError: the first mistake.
    """
    section = config.input
    for key in ("batch_size", "eval_batch_size", "prefetch", "repeats"):
        if section[key] < 1:
            raise ValueError(f"config.input.{key} must be 1 or more, got {section[key]}")
    if section.num_threads is not None and section.num_threads < 1:
        raise ValueError("config.input.num_threads must be 1 or more, or None for all cores")
    if not 0 <= section.max_bad_share <= 1:
        raise ValueError(
            f"config.input.max_bad_share must be in [0, 1], got {section.max_bad_share}"
        )
    for key, allowed in (("on_bad_example", POLICIES), ("cache", ("off", *FORMS))):
        if section[key] not in allowed:
            raise ValueError(
                f"config.input.{key} {section[key]!r} is unknown; allowed: {', '.join(allowed)}"
            )
    try:
        addresses = parse_addresses(section.service)
    except ValueError as error:
        raise ValueError(f"config.input.service={section.service!r}: {error}") from None
    if addresses and section.on_bad_example == "mask":
        raise ValueError(
            "config.input.service does not go with config.input.on_bad_example='mask', whose count "
            "is kept in this process: set it to 'fail', or leave the service out"
        )
    if section.service_timeout <= 0:
        raise ValueError(
            f"config.input.service_timeout must be above 0, got {section.service_timeout}"
        )


def open_sources(
    config: ConfigDict, *, training: bool = True, splits: Sequence[str] | None = None
) -> dict[str, Source]:
    """Opens splits of the data: for a training all that the config names, "train" with its cache.

    Args:
      config: finalised.
      training: whether "train" is to be trained on; else it is a split like any other.
      splits: of "train", "val", "test", those to open; None for all that the config names, without
        a training for all of these but "train".

    Raises:
      ValueError: a split that is not configured or not there, or sets of classes that differ.
    """
    options = {k: v for k, v in config.data.items() if not k.endswith("_split") and k != "source"}
    own = options.pop("options")
    if own is not None and not hasattr(own, "items"):
        raise ConfigError(f"config.data.options must be a dict of arguments, got {own!r}")
    options |= dict(own or {})
    configured = {s: config.data[f"{s}_split"] for s in SPLITS if config.data[f"{s}_split"]}
    if training and "train" not in configured:
        raise ValueError("config.data.train_split must name a split")
    if splits is None:
        splits = [s for s in configured if training or s != "train"]
    for split in splits:
        if split not in configured:
            raise ValueError(f"split {split!r} is not configured; there are {sorted(configured)}")
    if not splits:
        raise ValueError(
            "there is nothing to evaluate on: set config.data.val_split or config.data.test_split"
        )
    if config.data.source == "folder" and config.input.on_bad_example == "mask":
        options["check_files"] = False  # what is no image is masked when it is met
    sources = {
        name: open_source(config.data.source, split=configured[name], **options) for name in splits
    }
    if training and config.input.cache != "off":
        sources["train"] = CachedSource(
            sources["train"],
            config.input.cache,
            folder=config.input.cache_dir or None,
            keep_damaged=config.input.on_bad_example == "mask",
        )
    if training and config.input.service and not sources["train"].portable:
        raise ValueError(
            f"config.input.service cannot read {sources['train']}"
            + (" from config.input.cache" if config.input.cache != "off" else "")
            + ": that calls Python in this process. It takes demo, folder, synthetic, tfrecord, "
            "TFDS sets prepared as tfrecord and mixtures of these, with config.input.cache='off'"
        )
    (first, one), *others = sources.items()
    for name, source in others:
        if source.num_classes != one.num_classes:
            raise ValueError(
                f"split {name!r} has {source.num_classes} classes, {first} has {one.num_classes}"
            )
    return sources
