"""Labels that stand for no class: found where an example is made, and explained.

Without a check nothing would fail: a one-hot row of a label outside of the classes is all zeros, so
such an example trains towards nothing and counts as an error wherever accuracy is measured.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures

import tensorflow as tf

from vit_dist.config.errors import DataError

# How messages begin, in a graph and in Python.
OUTSIDE = "its label is"
NO_SHARES = "the shares of its label sum to"
# What stands between the parts of a message: a graph puts parts in brackets, an eager assertion on
# lines of their own and in quotes, and a data service passes them on with spaces.
_NEXT = r"(?:\] \[|'?\n| )"
_FOUND = re.compile(rf"{re.escape(OUTSIDE)}{_NEXT}(-?\d+).*?; example{_NEXT}(\d+)", re.S)
_FOUND_SHARES = re.compile(
    rf"{re.escape(NO_SHARES)}{_NEXT}([^\s\]]+).*?; example{_NEXT}(\d+)", re.S
)
MAX_LABELS = 5000  # looked at to say what the labels' first number is
NUM_THREADS = 32
ROUNDING = 1e-3  # of the sum of a label's shares, stored in half precision at worst


def check(label: tf.Tensor, num_classes: int, index: tf.Tensor) -> tf.Tensor:
    """Returns the label of one example (scalar int32); fails unless it is in [0, num_classes).

    The error is tf.errors.InvalidArgumentError, in whose message `find` finds label and example.
    """
    right = (label >= 0) & (label < num_classes)
    # Texts and tensors, which TensorFlow puts into the message only if the check fails.
    told = [OUTSIDE, label, f"outside of the classes 0 to {num_classes - 1}; example", index]
    with tf.control_dependencies([tf.debugging.Assert(right, told)]):
        return tf.identity(label)


def check_shares(label: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Returns a label that is a row of shares (float, (C,)); fails unless they are a distribution.

    Softmax cross-entropy takes each row as one: with another sum an example weighs more or less
    than the others.
    """
    total = tf.reduce_sum(label)
    right = (tf.abs(total - 1) <= ROUNDING) & tf.reduce_all(label >= 0)
    told = [NO_SHARES, total, "and not to 1; example", index]
    with tf.control_dependencies([tf.debugging.Assert(right, told)]):
        return tf.identity(label)


def problem(label: int, num_classes: int) -> str | None:
    """Returns why a label read in Python stands for no class, None if it stands for one."""
    if 0 <= label < num_classes:
        return None
    return f"{OUTSIDE} {label}, outside of the classes 0 to {num_classes - 1}"


def concerns(message: str) -> bool:
    """Whether a message is that of a `check`."""
    return OUTSIDE in message or NO_SHARES in message


def find(message: str) -> tuple[int, int] | None:
    """Returns label and number of the example out of the message of a failed `check`."""
    found = _FOUND.search(message)
    return (int(found[1]), int(found[2])) if found else None


def find_shares(message: str) -> tuple[str, int] | None:
    """Returns problem and number of the example out of the message of a failed `check_shares`."""
    found = _FOUND_SHARES.search(message)
    if not found:
        return None
    total = float(found[1])
    if abs(total - 1) <= ROUNDING:
        return "a share of its label is negative", int(found[2])
    return f"{NO_SHARES} {total:g} and not to 1", int(found[2])


def advise(
    label: int, num_classes: int, *, first_label: int | None, others: Iterable[int] = ()
) -> str:
    """Returns what to do about a label outside of the classes.

    Args:
      label: As the source gives it: what is stored, less `first_label`.
      num_classes: Of the source.
      first_label: The source's option of that name; None if it has none.
      others: Labels of further examples, as the source gives them.
    """
    # The labels as the files have them, to find from which number the files count.
    stored = [x + (first_label or 0) for x in (*others, label)]
    low, high = min(stored), max(stored)
    for first in (0, 1):  # no other first number is in use, as far as is known
        # Every label must be a class then, and the last class must occur: else a few labels of a
        # correct set could pass for a set that counts from 1.
        fits = first <= low and high < first + num_classes and high - first >= num_classes - 1
        if not fits or first == (first_label or 0):
            continue
        text = f"All {len(stored)} labels looked at are in {first}..{high}: they count from {first}"
        if first_label is None:
            return f"{text}. Store them counted from 0"
        return f"{text}. Set config.data.first_label={first}"
    # Either -1 is stored, or a stored 0 becomes -1 by first_label=1.
    if -1 in (label, stored[-1]):
        return (
            "-1 stands for a label that is not known, as in test splits whose labels are kept "
            "secret: leave such a split out, or label it"
        )
    if first_label is None:
        return "Correct the label"
    return (
        f"Correct the label, config.data.num_classes (or the class file) or first_label "
        f"({first_label})"
    )


def check_sampled(
    labels: Sequence[int | None],
    num_classes: int,
    *,
    first_label: int | None,
    describe: Callable[[int], str],
    lenient: bool,
) -> None:
    """Looks at the labels of a few examples when a source is opened.

    Args:
      labels: As the source gives them; None for an example that cannot be read.
      num_classes: Of the source.
      first_label: The source's option of that name; None if it has none.
      describe: Position in `labels` -> what messages call the example.
      lenient: A few of them may be outside of the classes, and are masked when they are met. If
        most are, it is the split, or an option, that is wrong.

    Raises:
      DataError: A label is outside of the classes; names it and says what to do.
    """
    # An example that cannot be read is not counted here; it is named when the pipeline meets it.
    known = [label for label in labels if label is not None]
    wrong = [i for i, x in enumerate(labels) if x is not None and problem(x, num_classes)]
    # Masking is for a few bad labels. More than half of them are a sign of a wrong option.
    if not wrong or (lenient and len(wrong) <= max(len(known) // 2, 1)):
        return
    label = labels[wrong[0]]
    assert label is not None
    less = f" ({label + first_label} less first_label)" if first_label else ""
    share = f", as are {len(wrong)} of the {len(known)} looked at" if len(wrong) > 1 else ""
    raise DataError(
        f"{describe(wrong[0])}: {problem(label, num_classes)}{less}{share}. "
        + advise(label, num_classes, first_label=first_label, others=known)
    )


def look_at(load: Callable[[int], int], indices: Sequence[int]) -> list[int | None]:
    """Returns the labels of some examples, None for one that cannot be read."""

    def one(index: int) -> int | None:
        try:
            return load(index)
        except (ValueError, FileNotFoundError):
            return None

    # In parallel, as each waits for a disk or a network.
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(one, indices))
