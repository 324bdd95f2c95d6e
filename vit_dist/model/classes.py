"""Whether the classes of a checkpoint's head are those of the data, and in which order.

Labels are numbers; only names tell whether number 3 means the same on both sides.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vit_dist.config.binding import look_alike


class ClassMatch(NamedTuple):
    """How the classes of a checkpoint's head and the classes wanted relate.

    Attributes:
      order: for each wanted class its number in the checkpoint; None to take them as they are.
      other: why the head cannot be used; "" if it can.
      assumed: what is taken for granted where the head is used all the same.
    """

    order: list[int] | None = None
    other: str = ""
    assumed: str = ""


def match_classes(theirs: Sequence[str], ours: Sequence[str]) -> ClassMatch:
    """Compares the names of classes by which a head's outputs are told apart.

    Args:
      theirs: of the checkpoint, in the order of its head; () if unknown.
      ours: of the data, in the order of its labels; () if unknown.
    """
    # Nothing to compare, or nothing differs: the head is taken as it is.
    if not theirs or not ours or list(theirs) == list(ours):
        return ClassMatch()
    # Twin names cannot be told apart: such lists are the same only if they are equal.
    unique = len(set(theirs)) == len(theirs) and len(set(ours)) == len(ours)
    if unique and set(theirs) == set(ours):
        # The column of the checkpoint's head for each class, in the order of the data's labels.
        place = {name: i for i, name in enumerate(theirs)}
        return ClassMatch(order=[place[name] for name in ours])
    # Data without names, such as TFRecords without a class file, calls its classes "0", "1", ...
    # Where only one side has such numbers, names say nothing, and the order is trusted.
    if len(theirs) == len(ours) and _numbered(theirs) != _numbered(ours):
        sides = [("the checkpoint's", theirs), ("the data's", ours)]
        (one, names), (other, _) = sorted(sides, key=lambda side: _numbered(side[1]))
        text = f"that {one} classes ({_shortened(names)}) are {other} 0, 1, ... in this order"
        return ClassMatch(assumed=text)
    # For the message: what the checkpoint does not know says more than what it knows besides.
    missing = [name for name in ours if name not in set(theirs)]
    lost = [name for name in theirs if name not in set(ours)]
    text = f"its {len(theirs)} classes are not the {len(ours)} of the data"
    # One cause is named, the likeliest first.
    if missing:
        text += f" ({_shortened(missing)} {'is' if len(missing) == 1 else 'are'} not in it)"
        text += look_alike(missing, theirs)
    elif lost:
        text += f" ({_shortened(lost)} {'is' if len(lost) == 1 else 'are'} not in the data)"
    else:
        text += " (a name stands for two of them)"
    return ClassMatch(other=text)


def _numbered(names: Sequence[str]) -> bool:
    return list(names) == [str(i) for i in range(len(names))]


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
