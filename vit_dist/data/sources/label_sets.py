"""Examples with a set of right labels, as in ReaL ("Are we done with ImageNet?", arXiv 2006.07159).

In a record a set is its class numbers, (K,) int32, filled up with -1; in an example it is a float32
row (C,) with 1 for each right class. A set may be empty: nobody could name what the image shows.
"""

import collections
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist import paths
from vit_dist.config.errors import DataError

# How ILSVRC2012 calls validation images: number i has entry i - 1 of ReaL's list.
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


def read_label_sets(path: str, files: Sequence[str], *, num_classes: int) -> np.ndarray:
    """Reads which classes are right for each image file.

    Args:
      path: JSON: a list of lists of class numbers, as ReaL's real.json, whose entry i belongs to
        the file ILSVRC2012_val_{i + 1}; or an object, file -> list of class numbers, where a file
        is "class/name", or "name" if one folder alone has such a file.
      files: the image files, as "class/name".
      num_classes: class numbers are in [0, num_classes).

    Returns:
      int32 (files, K), filled up with -1.

    Raises:
      DataError: no such JSON, a file without an entry, an entry that may be of several files, or a
        number that is no class.
    """
    sets = _parsed(path)
    counts = collections.Counter(map(_bare, files))
    rows = [_entry(sets, name, path, twins=counts[_bare(name)] - 1) for name in files]
    for name, row in zip(files, rows, strict=True):
        for number in row:
            # Not isinstance(): JSON's true would pass as 1.
            if type(number) is not int or not 0 <= number < num_classes:
                raise DataError(
                    f"{path} gives {name} the label {number!r}, and there are {num_classes} "
                    f"classes, 0 to {num_classes - 1}: the numbers are those of the class "
                    "directories of the training split, sorted by name"
                )
    table = np.full((len(rows), max(map(len, rows), default=0) or 1), -1, np.int32)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def as_row(numbers: tf.Tensor, num_classes: int) -> tf.Tensor:
    """A set's class numbers, (K,) with -1 for none -> float32 (C,), 1 for each right class.

    A number beyond the classes raises tf.errors.InvalidArgumentError.
    """
    numbers = tf.boolean_mask(numbers, numbers >= 0)
    # scatter_nd wants an index for each axis of the result: a column (K, 1) for one axis.
    counts = tf.scatter_nd(numbers[:, tf.newaxis], tf.ones_like(numbers, tf.float32), [num_classes])
    return tf.minimum(counts, 1.0)  # a number that stands there twice counts once


def _parsed(path: str) -> Any:
    file = paths.expand(path)
    try:
        sets = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError(f"config.data.label_file {path}: there is no such file") from None
    except ValueError as error:
        raise DataError(f"config.data.label_file {path} is no JSON: {error}") from None
    values = sets.values() if isinstance(sets, dict) else sets
    if not isinstance(sets, (list, dict)) or not all(isinstance(v, list) for v in values):
        raise DataError(
            f"config.data.label_file {path} must hold a list of lists of class numbers, as ReaL's "
            "real.json, or an object: file -> list of class numbers"
        )
    return sets


def _bare(file: str) -> str:
    return file.rpartition("/")[2]


def _entry(sets: Any, file: str, path: str, *, twins: int) -> list[Any]:
    """The labels of a file, "class/name", where so many other folders have a file of its name."""
    name = _bare(file)
    if isinstance(sets, dict):
        if file in sets:
            return sets[file]
        if name not in sets:
            raise DataError(
                f"{path} has no labels for {name}, nor for {file}: add them ([] for none)"
            )
        # One entry would give its labels to all of them.
        if twins:
            raise DataError(
                f"{path} gives labels for {name}, and {twins + 1} folders have a file of that "
                f"name: name each with its folder, as {file}"
            )
        return sets[name]
    found = _VALIDATION.fullmatch(name)
    if found is None or not 1 <= int(found[1]) <= len(sets):
        raise DataError(
            f"{path} is a list of {len(sets)} sets of labels, for the files "
            f"ILSVRC2012_val_00000001 to ILSVRC2012_val_{len(sets):08d}, and there is {name}: give "
            "an object, file -> list of class numbers"
        )
    return sets[int(found[1]) - 1]
