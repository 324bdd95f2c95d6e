"""Opens a source of labelled images by name, e.g. `open_source("demo", split="train")`."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from vit_dist.config.errors import ConfigError
from vit_dist.data.sources.array_record import ArrayRecordSource
from vit_dist.data.sources.digits import DemoSource
from vit_dist.data.sources.folder import FolderSource
from vit_dist.data.sources.mixture import MixtureSource
from vit_dist.data.sources.raw import RawSource
from vit_dist.data.sources.source import Source
from vit_dist.data.sources.synthetic import SyntheticSource
from vit_dist.data.sources.tfds import TfdsSource
from vit_dist.data.sources.tfrecord import TfrecordSource

SOURCES: dict[str, Callable[..., Source]] = {
    "demo": DemoSource,
    "folder": FolderSource,
    "tfds": TfdsSource,
    "tfrecord": TfrecordSource,
    "array_record": ArrayRecordSource,
    "raw": RawSource,
    "synthetic": SyntheticSource,
    "mixture": MixtureSource,
}


def open_source(source: str, *, split: str, **options) -> Source:
    """Opens a split of a data set. Touches no device and runs no TensorFlow op.

    Args:
      source: One of SOURCES.
      split: Which part, e.g. "train"; a tfds source takes TFDS's syntax, e.g. "train[:99%]".
      **options: The arguments of that source's class (e.g. `data_dir`); those that are None
        count as not given.

    Raises:
      ConfigError: `source`, an option, the split or a folder is unknown.
      DataError: The data is not fit for use.
    """
    if source not in SOURCES:
        raise ConfigError(
            f"unknown source {source!r}{_nearest(source, SOURCES)}; known: {sorted(SOURCES)}"
        )
    # Each default lives in its source's class, so that a key which is None is simply left out.
    given = {key: value for key, value in options.items() if value is not None}
    # A mixture's options are those of its parts; they are checked as each part is opened.
    if source == "mixture":
        return _open_mixture(split, **given)
    # A source's arguments are its options: a new one needs no list here.
    signature = inspect.signature(SOURCES[source])
    allowed = [name for name in signature.parameters if name != "split"]
    for option in given:
        if option not in allowed:
            raise ConfigError(
                f"source {source!r} takes no option {option!r}{_nearest(option, allowed)}; "
                f"it takes {allowed}"
            )
    # Fails where an option that has no default is missing.
    try:
        signature.bind(split=split, **given)
    except TypeError as error:
        raise ConfigError(f"source {source!r}: {error}; it takes {allowed}") from None
    return SOURCES[source](split=split, **given)


def _open_mixture(split: str, parts: Any = None, train_split: str = "train", **options) -> Source:
    """Opens the sources that `parts` describes; other options hold for each that takes them."""
    if not isinstance(parts, (list, tuple)) or not all(
        isinstance(part, Mapping) and {"source", "weight"} <= set(part) for part in parts
    ):
        raise ConfigError(
            "source 'mixture' needs parts: a list of dicts, each with source, weight, its options "
            f"and, where it differs, split; got {parts!r}"
        )
    # All of them before a part is opened, which may take long.
    names = [_splits_of(part, split, train_split) for part in parts]
    opened = []
    for part, (its_split, its_train_split) in zip(parts, names, strict=True):
        # A part's own options take precedence over the mixture's.
        own = {k: v for k, v in part.items() if k not in ("source", "weight", "split")}
        # None for a name that is unknown: open_source below names it.
        kind = SOURCES.get(part["source"])
        known = inspect.signature(kind).parameters if kind else {}
        # Options of the mixture go to the parts that have such an option.
        common = {k: v for k, v in options.items() if k in known}
        if "train_split" in known:
            common["train_split"] = its_train_split  # its directories are the part's classes
        opened.append(open_source(part["source"], split=its_split, **{**common, **own}))
    return MixtureSource(opened, [part["weight"] for part in parts])


def _splits_of(part: Mapping[str, Any], split: str, train_split: str) -> tuple[str, str]:
    """Returns what a part calls the mixture's split that is opened, and its training split."""
    named = part.get("split")
    if named is None:
        return split, train_split
    if isinstance(named, Mapping) and split in named:
        return named[split], named.get(train_split, train_split)
    # One name stands for the training split: read for another one too, validation would be on
    # images that are trained on.
    if isinstance(named, str) and split == train_split:
        return named, named
    raise ConfigError(
        f"the part {dict(part)} of the mixture has no split for {split!r}: its split must be a "
        f"dict with what each is called there, such as {{{train_split!r}: "
        f"{named if isinstance(named, str) else train_split!r}, {split!r}: ...}}, as a single name "
        f"is that of the training split ({train_split!r}); or leave {split!r} out with "
        'config.data.val_split="" and test_split=""'
    )


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
