"""From a config to the opened sources of a run's splits."""

from typing import Any

from ml_collections import ConfigDict

from vit_dist.config.defaults import parse_image_size
from vit_dist.data.damage import POLICIES
from vit_dist.data.ops.decoding import decoding_of
from vit_dist.data.ops.pipe import parse
from vit_dist.data.service import parse_addresses
from vit_dist.data.sources.cache import FORMS, CachedSource
from vit_dist.data.sources.open import open_source
from vit_dist.data.sources.source import Source

_SPLITS = ("train", "val", "test")


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


def open_sources(config: ConfigDict) -> dict[str, Source]:
    """Opens the splits that the config names, the training split with its cache.

    Raises:
      ValueError: a split that is not there, or sets of classes that differ.
    """
    options = {k: v for k, v in config.data.items() if not k.endswith("_split") and k != "source"}
    splits = {s: config.data[f"{s}_split"] for s in _SPLITS if config.data[f"{s}_split"]}
    if "train" not in splits:
        raise ValueError("config.data.train_split must name a split")
    if config.data.source == "folder" and config.input.on_bad_example == "mask":
        options["check_files"] = False  # what is no image is masked when it is met
    sources = {k: open_source(config.data.source, split=v, **options) for k, v in splits.items()}
    if config.input.cache != "off":
        sources["train"] = CachedSource(
            sources["train"],
            config.input.cache,
            folder=config.input.cache_dir or None,
            keep_damaged=config.input.on_bad_example == "mask",
            decoding=_decoding(config, sources["train"].num_classes),
        )
    if config.input.service and not sources["train"].portable:
        raise ValueError(
            f"config.input.service cannot read {sources['train']}"
            + (" from config.input.cache" if config.input.cache != "off" else "")
            + ": that calls Python in this process. It takes demo, folder, synthetic, tfrecord, "
            "TFDS sets prepared as tfrecord and mixtures of these, with config.input.cache='off'"
        )
    for name, source in sources.items():
        if source.num_classes != sources["train"].num_classes:
            raise ValueError(
                f"split {name!r} has {source.num_classes} classes, "
                f"train has {sources['train'].num_classes}"
            )
    return sources


def _decoding(config: ConfigDict, num_classes: int) -> dict[str, Any]:
    """How training decodes images, for a cache of decoded ones."""
    size = parse_image_size(config.image_size)
    return decoding_of(parse(config.input.train_ops, size=size, num_classes=num_classes))
