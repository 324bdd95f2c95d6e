"""What became of every tensor when the weights of one ViT were loaded into another."""

import dataclasses
import re
from collections.abc import Sequence


@dataclasses.dataclass
class LoadReport:
    """What became of every tensor: lines that begin with its name."""

    loaded: list[str] = dataclasses.field(default_factory=list)  # unchanged
    mapped: list[str] = dataclasses.field(default_factory=list)  # a head, its classes reordered
    resized: list[str] = dataclasses.field(default_factory=list)  # "name (1,16,64) -> (1,64,64)"
    new: list[str] = dataclasses.field(default_factory=list)  # keeps the model's initial value
    unused: list[str] = dataclasses.field(default_factory=list)  # in the checkpoint, of no use here
    assumed: list[str] = dataclasses.field(default_factory=list)  # what the checkpoint did not tell
    notes: list[str] = dataclasses.field(default_factory=list)  # what else a user should know

    def __str__(self) -> str:
        """A summary: how many of each kind, then in full what was changed, assumed or noted."""
        counts = [f"loaded {len(self.loaded)} tensors unchanged"]
        for kind in ("resized", "mapped", "new", "unused"):
            texts = getattr(self, kind)
            if texts:
                # Kinds that are listed in full below need no parts here.
                parts = "" if kind in _SHOWN else f" ({_parts(texts)})"
                counts.append(f"{len(texts)} {kind}{parts}")
        lines = [", ".join(counts)]
        return "\n".join(lines + self._lines(_SHOWN))

    def _lines(self, kinds: Sequence[str]) -> list[str]:
        return [f"{_TITLES[k]}: {text}" for k in kinds for text in _collapsed(getattr(self, k))]

    def remarks(self) -> list[str]:
        """Lines on what a user should know even where all tensors were taken."""
        return self._lines(_REMARKS)

    def full(self) -> str:
        """Every tensor, one a line: for a log."""
        lines = ((title, text) for kind, title in _TITLES.items() for text in getattr(self, kind))
        return "\n".join(f"{title}: {text}" for title, text in lines)


# How a line of each kind begins, in this order.
_TITLES = {
    "loaded": "loaded",
    "mapped": "mapped",
    "resized": "resized",
    "new": "new",
    "unused": "unused",
    "assumed": "assumed",
    "notes": "note",
}
_SHOWN = ("mapped", "resized", "assumed", "notes")  # line by line in the summary too
_REMARKS = ("mapped", "assumed", "notes")


def _parts(lines: Sequence[str], most: int = 4) -> str:
    """The parts of a network that tensors belong to: "head/kernel (64, 5)" is of "head"."""
    # Each part once, in the order of the network.
    names = list(dict.fromkeys(_part(line) for line in lines))
    return ", ".join(names[:most] + ["..."] * (len(names) > most))


def _collapsed(lines: Sequence[str]) -> list[str]:
    """More than a dozen lines by parts: "24 tensors encoderblock_0..."."""
    if len(lines) <= 12:
        return list(lines)
    # A deep network has hundreds of tensors that met the same fate.
    groups: dict[str, int] = {}
    for line in lines:
        groups[_part(line)] = groups.get(_part(line), 0) + 1
    return [f"{count} tensors {part}..." for part, count in groups.items()]


def _part(line: str) -> str:
    # Our names have slashes, PyTorch's dots; a space comes before a shape.
    return re.split(r"[/. ]", line)[0]
