"""From a config to the opened sources of a run's splits."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_dist.cluster.strategy import find_slice
from vit_dist.config.defaults import parse_image_size
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.config.imports import check_imports, import_modules
from vit_dist.data.damage import POLICIES
from vit_dist.data.ops.decoding import decoding_of
from vit_dist.data.ops.pipe import parse
from vit_dist.data.service import parse_addresses
from vit_dist.data.sources.cache import FORMS, CachedSource
from vit_dist.data.sources.open import SOURCES, open_source
from vit_dist.data.sources.source import Source

SPLITS = ("train", "val", "test")


def check_input(config: ConfigDict) -> None:
    """Checks config.input except for its pipes; opens nothing.

    Raises:
      ConfigError: the first mistake.
    """
    section = config.input
    for key, allowed in (("on_bad_example", POLICIES), ("cache", ("off", *FORMS))):
        if section[key] not in allowed:
            raise ConfigError(
                f"config.input.{key} {section[key]!r} is unknown; allowed: {', '.join(allowed)}"
            )
    try:
        addresses = parse_addresses(section.service)
    except ValueError as error:
        raise ConfigError(f"config.input.service={section.service!r}: {error}") from None
    if addresses and section.on_bad_example == "mask":
        raise ConfigError(
            "config.input.service does not go with config.input.on_bad_example='mask', whose count "
            "is kept in this process: set it to 'fail', or leave the service out"
        )


def open_sources(
    config: ConfigDict, *, training: bool = True, splits: Sequence[str] | None = None
) -> dict[str, Source]:
    """Opens splits of the data: for a training all that the config names, "train" with its cache.

    Args:
      config: finalised.
      training: whether "train" is to be trained on; else it is a split like any other.
      splits: which of "train", "val", "test" to open. None for all that the config names, without
        "train" if nothing is trained.

    Returns:
      Name of the split -> source, in the order of SPLITS or of `splits`.

    Raises:
      ConfigError: a split that is not configured, or an option that cannot work.
      DataError: a split that is not there or not fit for use, or splits with different classes.
    """
    # Before a source is looked up: it may be one of the user's own.
    import_modules(check_imports(config.imports))
    names = _splits(config, training, splits)
    options = _options(config, config.data)
    sources = {
        name: open_source(config.data.source, split=config.data[f"{name}_split"], **options)
        for name in names
    }
    for name, source in sources.items():
        if source.label_sets is not None:
            raise ConfigError(
                f"{source} has a set of labels for each example, and {name!r} takes one: leave "
                "config.data.label_key and label_file out there, and set them in the data of an "
                "entry of config.evals of kind 'real'"
            )
    # The cache wraps the source and takes its place: whatever reads "train" reads the cache.
    if training and config.input.cache != "off":
        sources["train"] = CachedSource(
            sources["train"],
            config.input.cache,
            folder=config.input.cache_dir or None,
            keep_damaged=config.input.on_bad_example == "mask",
            decoding=_decoding(config, sources["train"].num_classes),
        )
    if training and config.input.service:
        check_portable(sources["train"], config.input, "config.input.service")
    if find_slice(config.strategy.name, config.strategy.tpu):
        check_slice(sources, config.input)
    check_classes(sources)
    return sources


def open_split(config: ConfigDict, data: ConfigDict, split: str) -> Source:
    """Opens one split of another section than config.data, to be evaluated on.

    Args:
      config: finalised.
      data: a section with the keys of config.data.
      split: as the source names it.

    Raises:
      ConfigError, DataError: see open_sources.
    """
    source = open_source(data.source, split=split, **_options(config, data))
    if find_slice(config.strategy.name, config.strategy.tpu):
        check_slice({split: source}, config.input)
    return source


def check_portable(
    source: Source, section: ConfigDict, reader: str, *, cached: bool = False
) -> None:
    """Checks that other processes than this one can make batches of a source.

    Python functions inside a pipeline run only in the process that made them, so a pipeline that is
    sent elsewhere must have none.

    Args:
      source: the training split's.
      section: config.input.
      reader: what makes the batches there, such as "config.input.service" or "a TPU slice".
      cached: whether the source is to be read from section.cache, and has not been wrapped in it.

    Raises:
      ConfigError: making the batches calls Python in this process; says which part does.
    """
    if section.on_bad_example == "mask":
        raise ConfigError(
            f"{reader} does not go with config.input.on_bad_example='mask', which calls Python in "
            "this process: set it to 'fail'"
        )
    if cached or not source.portable:
        raise ConfigError(
            f"{reader} cannot read {source}"
            + (" from config.input.cache" if section.cache != "off" else "")
            + ": that calls Python in this process. It takes demo, folder, raw, synthetic, "
            "tfrecord, TFDS sets prepared as tfrecord and mixtures of these, with "
            "config.input.cache='off'"
        )


def check_slice(
    sources: Mapping[str, Source], section: ConfigDict, *, cached: bool = False
) -> None:
    """Checks that the hosts of a TPU slice, whose TensorFlow runs no Python, can read all splits.

    Args:
      sources: of the splits.
      section: config.input.
      cached: see check_portable; for all of the splits.

    Raises:
      ConfigError: they cannot; says which part of the config calls Python, and what to take.
    """
    reader = "a TPU slice of several hosts"
    if section.service:
        raise ConfigError(
            f"{reader} does not go with config.input.service, whose batches come by way of Python "
            "in this process: leave the service out, as each host of the slice reads its own part"
        )
    for source in sources.values():
        check_portable(source, section, reader, cached=cached)


def _splits(config: ConfigDict, training: bool, splits: Sequence[str] | None) -> Sequence[str]:
    """Which of SPLITS to open."""
    configured = [s for s in SPLITS if config.data[f"{s}_split"]]
    if training and "train" not in configured:
        raise ConfigError("config.data.train_split must name a split")
    if splits is None:
        splits = [s for s in configured if training or s != "train"]
    for split in splits:
        if split not in configured:
            raise ConfigError(f"split {split!r} is not configured; there are {sorted(configured)}")
    if not splits:
        raise ConfigError(
            "there is nothing to evaluate on: set config.data.val_split or config.data.test_split"
        )
    return splits


def _options(config: ConfigDict, data: ConfigDict) -> dict[str, Any]:
    """The arguments of the source of a section such as config.data, except for the split."""
    options = {k: v for k, v in data.items() if not k.endswith("_split") and k != "source"}
    # Below run/ nobody takes a ConfigDict: a dict of the config, such as counts, becomes plain.
    options = {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in options.items()}
    own = options.pop("options")
    if own is not None and not hasattr(own, "items"):
        raise ConfigError(f"config.data.options must be a dict of arguments, got {own!r}")
    # Options that follow from other keys of the config, for sources that take them.
    taken = _taken(data.source)
    # The directories of the training split are the classes of all splits.
    if "train_split" in taken:
        options["train_split"] = data.train_split or None
    # A check of all files at the start would refuse damaged ones, which are to be masked instead.
    if "check_files" in taken and config.input.on_bad_example == "mask":
        options["check_files"] = False
    # config.data.options goes last: it may replace any of these.
    return options | dict(own or {})


def _taken(name: str) -> set[str]:
    """The options that a source takes; a mixture passes them on to each part that takes them."""
    kinds = list(SOURCES.values()) if name == "mixture" else [SOURCES.get(name, Source)]
    return {option for kind in kinds for option in inspect.signature(kind).parameters}


def check_classes(sources: Mapping[str, Source]) -> None:
    """Checks that a label, a number, stands for the same class in all splits.

    Raises:
      DataError: a split has other classes than another, or the same classes in another order.
    """
    # All are compared with the first split, by number: the same set of names in another order
    # would give wrong accuracies without a word (law 9).
    (first, one), *others = sources.items()
    for name, source in others:
        if source.num_classes != one.num_classes:
            raise DataError(
                f"split {name!r} has {source.num_classes} classes, {first} has {one.num_classes}"
            )
        pairs = zip(source.class_names, one.class_names, strict=True)
        differ = [(i, mine, its) for i, (mine, its) in enumerate(pairs) if mine != its]
        if differ:
            number, mine, its = differ[0]
            same = set(source.class_names) == set(one.class_names)
            raise DataError(
                f"split {name!r} has "
                + (f"the classes of {first} in another order" if same else "other class names")
                + f": class {number} is {mine!r}, and {its!r} in {first} ({len(differ)} of "
                f"{one.num_classes} differ). Prepare the splits with one list of classes"
            )


def _decoding(config: ConfigDict, num_classes: int) -> dict[str, Any]:
    """How training decodes images; a cache of decoded images has to decode in the same way."""
    size = parse_image_size(config.image_size)
    return decoding_of(parse(config.input.train_ops, size=size, num_classes=num_classes))
