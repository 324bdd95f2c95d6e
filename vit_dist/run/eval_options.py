"""From config.evals to checked options and opened sources (law 3)."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from vit_dist.config import defaults as config_lib
from vit_dist.config.binding import bind, did_you_mean
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.ops.pipe import Pipe, parse
from vit_dist.data.pipeline import check_pipe
from vit_dist.data.sources.source import Source
from vit_dist.evaluators.registry import KINDS, LOGITS
from vit_dist.run.options import EvalOptions
from vit_dist.run.sources import SPLITS, check_classes, open_split

# What rows of metrics call other things: an evaluation of such a name would mix with them.
_TAKEN = (*SPLITS, "speed", "memory", "optimizer", "data", "goodput", "restarts", "step", "time")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An entry of config.evals.

    Attributes:
      kind: one of KINDS.
      split: as the source names it; "" for config.data.val_split.
      data: keys of config.data that differ. Where `source` is one of them, the other keys begin at
        their defaults.
      ops: the pipe; "" for config.input.eval_ops.
      every: steps; 0 for at the end of a training alone.
      options: of the kind.
    """

    kind: str
    split: str = ""
    data: object = None
    ops: str = ""
    every: int = 0
    options: object = None


def check_evals(
    config: FrozenConfigDict,
    sources: Mapping[str, Source],
    *,
    training: bool,
    names: Sequence[str] | None = None,
) -> tuple[dict[str, EvalOptions], dict[str, Source]]:
    """Checks config.evals and opens the splits that it names.

    Args:
      config: finalised, its modules imported.
      sources: the splits that are open already.
      training: whether "train" is trained on.
      names: which evaluations are wanted; None for all.

    Returns:
      Name -> options, and key -> source of all that is to be read, `sources` included.

    Raises:
      ConfigError: the first mistake, with the key that makes it.
      DataError: data that is not there, or whose classes do not fit.
    """
    entries = _section(config.evals, "config.evals")
    for name in names or ():
        if name not in entries:
            raise ConfigError(
                f"there is no evaluation {name!r}{did_you_mean(name, entries)}; "
                f"config.evals has {sorted(entries)}"
            )
    opened = _Opened(config, sources, training)
    found: dict[str, EvalOptions] = {}
    for name, values in entries.items():
        if names is None or name in names:
            found[name] = _check_entry(config, name, values, opened)
    return found, opened.sources


def _section(value: Any, where: str) -> dict[str, Any]:
    """A dict in the config as a plain one; {} for None."""
    if value is None:
        return {}
    if isinstance(value, ConfigDict):
        return value.to_dict()
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a dict, got {value!r}")
    return dict(value)


class _Opened:
    """Sources by key; a split that several evaluations read is opened once."""

    def __init__(self, config: FrozenConfigDict, sources: Mapping[str, Source], training: bool):
        self.sources = dict(sources)
        self._config = config
        # (keys of config.data, split) -> key of the source. "train" is none of them while it is
        # trained on: its count of damaged examples, and its cache, are the training's.
        plain = json.dumps({})
        self._keys = {
            (plain, config.data[f"{split}_split"]): split
            for split in sources
            if not (training and split == "train")
        }

    def open(self, name: str, values: Mapping[str, Any], data: ConfigDict, split: str) -> str:
        """Opens a split of an evaluation, or finds it open; returns its key."""
        wanted = (json.dumps(values, sort_keys=True, default=str), split)
        if wanted not in self._keys:
            key = f"{name}:{split}"
            self.sources[key] = open_split(self._config, data, split)
            self._keys[wanted] = key
        return self._keys[wanted]


def _check_entry(config: FrozenConfigDict, name: str, values: Any, opened: _Opened) -> EvalOptions:
    where = f"config.evals.{name}"
    if not re.fullmatch(r"[A-Za-z]\w*", str(name)) or name in _TAKEN:
        raise ConfigError(
            f"config.evals has {name!r}: a name is of letters, digits and _, begins with a letter, "
            f"and is none of {', '.join(_TAKEN)}"
        )
    entry = _Entry(**bind(_Entry, _section(values, where), name=f"evals.{name}"))
    if entry.kind not in KINDS:
        raise ConfigError(
            f"{where}.kind {entry.kind!r} is unknown{did_you_mean(entry.kind, KINDS)}; "
            f"allowed: {', '.join(KINDS)}; config.imports names modules with others"
        )
    if entry.every < 0:
        raise ConfigError(f"{where}.every must be 0 or more, got {entry.every}")
    kind = KINDS[entry.kind]
    options = _section(entry.options, f"{where}.options")
    options = bind(kind.make, options, name=f"evals.{name}.options")
    try:
        evaluate = kind.make(**options)
    except ConfigError as error:
        raise ConfigError(f"{where}.options: {error}") from None
    changed = _section(entry.data, f"{where}.data")
    data = _data(config, changed, f"{where}.data")
    split = entry.split or data.val_split
    if not split:
        raise ConfigError(f"{where}.split must name a split, as config.data.val_split names none")
    judged, train = opened.open(name, changed, data, split), ""
    if kind.train:
        if not data.train_split:
            raise ConfigError(f"{where} needs training examples: set {where}.data.train_split")
        train = opened.open(name, changed, data, data.train_split)
        check_classes({train: opened.sources[train], judged: opened.sources[judged]})
    source = opened.sources[judged]
    # The first split that was opened is the one whose classes the model's head has.
    head = next(iter(opened.sources.values()))
    pipe = parse(
        entry.ops or config.input.eval_ops,
        size=config_lib.parse_image_size(config.image_size),
        num_classes=source.num_classes,
    )
    for key in filter(None, (judged, train)):
        _check_labels(opened.sources[key], pipe, where)
    return EvalOptions(
        name=name,
        kind=kind,
        evaluate=evaluate,
        split=judged,
        train=train,
        pipe=pipe,
        where=f"{where}.ops" if entry.ops else "config.input.eval_ops",
        every=entry.every,
        columns=_columns(head, source, where) if kind.values == LOGITS else (),
    )


def _data(config: FrozenConfigDict, changed: Mapping[str, Any], where: str) -> ConfigDict:
    """The section that an evaluation's data is opened by: config.data with some keys changed."""
    # Another source takes other options: those of the training's would only be in its way.
    kept = {} if "source" in changed else config.data.to_dict()
    return config_lib.make_section("data", {**kept, **changed}, where)


def _columns(head: Source, source: Source, where: str) -> tuple[int, ...]:
    """The place among the classes of `head` of each class of `source`; () if they are the same."""
    if head.class_names == source.class_names:
        return ()
    # By name: sets such as ImageNet-A have some of the classes, and number them from 0.
    places = {name: place for place, name in enumerate(head.class_names)}
    unknown = [name for name in source.class_names if name not in places]
    if unknown:
        raise DataError(
            f"{where}: {source} has the class {unknown[0]!r}, which is none of the "
            f"{head.num_classes} classes of {head} ({len(unknown)} of {source.num_classes} are "
            "not): give the classes the same names"
        )
    return tuple(places[name] for name in source.class_names)


def _check_labels(source: Source, pipe: Pipe, where: str) -> None:
    """Raises ConfigError where the pipe makes rows of labels: evaluations take class numbers."""
    label = check_pipe(source, pipe).get("label")
    if label is not None and label.shape.rank != 0:
        raise ConfigError(
            f"{where} takes labels that are class numbers, and {str(pipe)!r} makes rows of shape "
            f"{tuple(label.shape)}: set {where}.ops to a pipe without onehot"
        )
