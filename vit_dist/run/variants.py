"""The runs of a sweep: which config keys they change, what they are called, how they compare."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit_dist.config.errors import ConfigError

# Key -> value as a command line writes it: {"optimizer.learning_rate": "3e-4"}.
Variant = dict[str, str]

_LONGEST_NAME = 120  # characters; file systems allow 255 bytes, and files in a run add to it


def parse_choices(text: str) -> tuple[str, list[str]]:
    """ "KEY=V1,V2" -> (KEY, [V1, V2]).

    A comma within brackets or quotes belongs to a value: "input.train_ops=a(1, 2)|b,c" has two.

    Raises:
      ConfigError: no key, no value, the same value twice, or brackets that do not match.
    """
    key, equals, values = text.partition("=")
    key = key.strip().removeprefix("--").removeprefix("config.")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(
            f"--set {text!r} is not KEY=VALUE,VALUE, such as "
            "--set optimizer.learning_rate=1e-3,3e-4"
        )
    found = _split(values, text)
    for value in found:
        if found.count(value) > 1:
            raise ConfigError(f"--set {text!r} names the value {value!r} twice")
    return key, found


def _split(values: str, text: str) -> list[str]:
    found, depth, quote = [""], 0, ""
    for letter in values:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            break
        if letter == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += letter
    if depth or quote:
        raise ConfigError(f"--set {text!r}: brackets or quotes in the values do not match")
    return [value.strip() for value in found]


def product(choices: Sequence[tuple[str, list[str]]]) -> list[Variant]:
    """All combinations; the last key changes fastest.

    Raises:
      ConfigError: a key is given twice.
    """
    keys = [key for key, _ in choices]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--set names {key} twice: write all its values in one, with commas")
    values = [found for _, found in choices]
    return [dict(zip(keys, each, strict=True)) for each in itertools.product(*values)]


def as_variants(listed: Any, *, file: str) -> list[Variant]:
    """What get_variants() of a config file gives: a list of {key: value}.

    Raises:
      ConfigError: it is something else.
    """
    if not isinstance(listed, list | tuple) or not listed:
        raise ConfigError(f"get_variants() of {file} must give a list of dicts, got {listed!r}")
    for each in listed:
        if not isinstance(each, Mapping) or not all(isinstance(key, str) for key in each):
            raise ConfigError(
                f'get_variants() of {file}: {each!r} is no dict such as {{"seed": 1}}'
            )
    # A text stands on a command line as it is, anything else as Python writes it.
    return [{k: v if isinstance(v, str) else repr(v) for k, v in each.items()} for each in listed]


def words_of(variant: Variant) -> list[str]:
    """What changes the config on a command line."""
    return [f"--config.{key}={value}" for key, value in variant.items()]


def name_variants(variants: Sequence[Variant]) -> list[str]:
    """A folder's name for each, such as "learning_rate=3e-4,seed=0".

    Raises:
      ConfigError: two variants are equal.
    """
    short = _short_names({key for variant in variants for key in variant})
    names = []
    for variant in variants:
        parts = [f"{short[key]}={value}" for key, value in variant.items()]
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(parts)) or "as_configured"
        names.append(name)
    # What was cut off, or written as "_", may have been the difference.
    for i, name in enumerate(names):
        if len(name) > _LONGEST_NAME or names.count(name) > 1:
            names[i] = f"{i:03d},{name}"[:_LONGEST_NAME]
    for i, variant in enumerate(variants):
        if variant in variants[:i]:
            raise ConfigError(f"the sweep holds a run twice: {' '.join(words_of(variant))}")
    return names


def _short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last part, or as many of its parts as tell it from the other keys."""
    keys, found = sorted(keys), {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            found[key] = ".".join(parts[-count:])
            if sum(f".{other}".endswith(f".{found[key]}") for other in keys) == 1:
                break
    return found


def table(rows: Sequence[Mapping[str, Any]], *, metric: str) -> str:
    """Rows as aligned text, the best by `metric` first; a metric named "...loss" is best if small.

    Args:
      rows: with "run", "outcome", and numbers or None by the same names in each.
      metric: what they are ordered by; rows without it come last.
    """
    ordered = sort_rows(rows, metric)
    columns = list(ordered[0])
    cells = [columns, *([_cell(row[c]) for c in columns] for row in ordered)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def sort_rows(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """Rows with the best by `metric` first; see `table`."""
    sign = 1 if metric.endswith("loss") else -1

    def place(row: Mapping[str, Any]) -> tuple[bool, float]:
        value = row.get(metric)
        # NaN compares with nothing: it is no result.
        if value is None or value != value:
            return True, 0.0
        return False, sign * value

    return sorted(rows, key=place)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
