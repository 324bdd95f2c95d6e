"""From config.evals to checked options and opened sources (law 3)."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from vit_dist.config import defaults as config_lib
from vit_dist.config.binding import bind, did_you_mean
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.ops.pipe import Pipe, parse
from vit_dist.data.pipeline import check_pipe
from vit_dist.data.sources.source import Source
from vit_dist.evaluators.corruption import CorruptionError
from vit_dist.evaluators.named import Named
from vit_dist.evaluators.registry import KINDS, LOGITS, METRICS, Kind
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
      image_size: that the network is judged at, one number or (height, width); None for
        config.image_size.
      classes: "all", or "present" to leave out the logits of classes that have no example.
      options: of the kind.
    """

    kind: str
    split: str = ""
    data: object = None
    ops: str = ""
    every: int = 0
    image_size: object = None
    classes: str = "all"
    options: object = None


class _Parsed(NamedTuple):
    """An entry whose kind is known and made; nothing is opened yet."""

    entry: _Entry
    where: str  # what messages call it
    kind: Kind
    evaluate: Callable[..., Mapping[str, float]]


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
    wanted = [name for name in entries if names is None or name in names]
    parsed = {name: _parse(name, entries[name]) for name in wanted}
    averages = {name: p for name, p in parsed.items() if p.kind.values == METRICS}
    for name, average in averages.items():
        for member in _members(average):
            if member not in entries:
                raise ConfigError(
                    f"config.evals.{name}.options.of names {member!r}, which is none of "
                    f"config.evals{did_you_mean(member, entries)}"
                )
            parsed.setdefault(member, _parse(member, entries[member]))
    opened = _Opened(config, sources, training)
    found = {
        name: _check_entry(config, name, p, opened)
        for name, p in parsed.items()
        if p.kind.values != METRICS
    }
    # They come last: what they average is judged before.
    found |= {name: _check_average(name, average, found) for name, average in averages.items()}
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


def _parse(name: str, values: Any) -> _Parsed:
    """Checks what needs no data."""
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
    if entry.classes not in ("all", "present"):
        raise ConfigError(f"{where}.classes must be 'all' or 'present', got {entry.classes!r}")
    if entry.classes == "present" and kind.values != LOGITS:
        raise ConfigError(
            f"{where}.classes 'present' leaves out logits, and the kind {entry.kind!r} judges "
            f"{kind.values}: leave it out"
        )
    return _Parsed(entry, where, kind, evaluate)


def _check_average(name: str, average: _Parsed, found: Mapping[str, EvalOptions]) -> EvalOptions:
    """The options of an evaluation of others, whose options are in `found`."""
    entry, where = average.entry, average.where
    for key in ("split", "data", "ops", "image_size"):
        if getattr(entry, key):
            raise ConfigError(
                f"{where}.{key} has no effect: the kind {entry.kind!r} reads no data of its own; "
                "set it in the evaluations that it averages"
            )
    members = _members(average)
    for member in members:
        known = found[member].metrics if member in found else ()
        if known is not None and "accuracy" not in known:
            raise ConfigError(
                f"{where}.options.of names {member!r}, which finds no accuracy but "
                f"{', '.join(known) or 'averages others itself'}"
            )
    return dataclasses.replace(
        found[members[0]],
        name=name,
        kind=average.kind,
        evaluate=average.evaluate,
        every=entry.every,
        metrics=_metrics(average.evaluate, (), 0),
    )


def _members(average: _Parsed) -> tuple[str, ...]:
    assert isinstance(average.evaluate, CorruptionError), "the registry says so"
    return average.evaluate.members


def _metrics(
    evaluate: Callable[..., Mapping[str, float]], class_names: Sequence[str], num_train: int
) -> tuple[str, ...] | None:
    """The names of what an evaluation can find; None where it does not tell."""
    if not isinstance(evaluate, Named):
        return None
    return (*evaluate.names(class_names, num_train), "examples")


def _check_entry(
    config: FrozenConfigDict, name: str, parsed: _Parsed, opened: _Opened
) -> EvalOptions:
    entry, where, kind, evaluate = parsed
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
    size = config_lib.parse_image_size(config.image_size)
    if entry.image_size is not None:
        size = config_lib.parse_image_size(entry.image_size, key=f"evals.{name}.image_size")
    ops = entry.ops or config.input.eval_ops
    pipe = parse(ops, size=size, num_classes=source.num_classes)
    for key in filter(None, (judged, train)):
        _check_labels(opened.sources[key], pipe, where, entry.kind)
    return EvalOptions(
        name=name,
        kind=kind,
        evaluate=evaluate,
        split=judged,
        train=train,
        pipe=pipe,
        where=f"{where}.ops" if entry.ops else "config.input.eval_ops",
        every=entry.every,
        image_size=size,
        present=entry.classes == "present",
        metrics=_metrics(
            evaluate, source.class_names, opened.sources[train].num_examples if train else 0
        ),
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


def _check_labels(source: Source, pipe: Pipe, where: str, kind: str) -> None:
    """Raises ConfigError where labels are not what the kind takes: class numbers, or sets."""
    sets = source.label_sets is not None
    if sets != KINDS[kind].sets:
        takes, has = ("a set of labels", "one") if KINDS[kind].sets else ("one label", "a set")
        others = [other for other in KINDS if KINDS[other].sets == sets]
        raise ConfigError(
            f"{where} of kind {kind!r} takes {takes} for each example, and {source} has {has} (by "
            f"config.data.label_key or label_file): take the kind {others[0]!r}, or other data"
        )
    if sets:
        check_pipe(source, pipe)  # rows of the number of classes
        return
    label = check_pipe(source, pipe).get("label")
    if label is not None and label.shape.rank != 0:
        raise ConfigError(
            f"{where} takes labels that are class numbers, and {str(pipe)!r} makes rows of shape "
            f"{tuple(label.shape)}: set {where}.ops to a pipe without onehot"
        )
