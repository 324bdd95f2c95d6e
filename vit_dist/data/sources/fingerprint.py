"""What tells one set of examples from another, wherever it lies: compared when a run resumes.

A fingerprint knows the number of the examples, the names of classes and files, how images were
resized beforehand, the order in which they are read, the sizes of local files, and the contents of
a few examples. It knows no path: a copy elsewhere has the same fingerprint. It cannot see that an
example outside of the sample was replaced by another of the same size, nor, in a bucket, of any
size.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NUM_SAMPLED = 16  # examples whose contents are compared
# A difference in one of these is another set, or another order: no resume can go on with it.
DECIDING = ("num_examples", "classes", "prepared", "names", "parts", "order")


def checksum(names: Iterable[str]) -> int:
    """Returns a CRC-32 of names, which also tells their order and where each ends."""
    crc = 0
    for name in names:
        # File names need not be UTF-8: Python keeps such bytes as surrogates.
        # The newline separates names: "ab", "c" and "a", "bc" have different checksums.
        crc = zlib.crc32(name.encode(errors="surrogateescape") + b"\n", crc)
    return crc


def printable(name: str) -> str:
    """Returns the name of a file on one line, also where it is not UTF-8 or holds a line's end."""
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    # Files with a name on each line, such as a SavedModel's labels.txt, would get a line too many.
    return text.replace("\n", "\\n").replace("\r", "\\r")


def sampled(num_examples: int) -> list[int]:
    """Returns the numbers of the examples that a fingerprint looks into: evenly spread, or all."""
    if num_examples <= NUM_SAMPLED:
        return list(range(num_examples))
    return [i * num_examples // NUM_SAMPLED for i in range(NUM_SAMPLED)]


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compares the fingerprint that a checkpoint holds with that of the data here.

    What one of them does not hold (a checkpoint of an older version, files in a bucket) decides
    nothing.

    Returns:
      Lines that say why the data is another set, or in another order; and lines that say what is
      noticeable, but may be a few files that were repaired. Without any line the data is taken for
      the same.
    """
    # A key that only one of them has cannot differ.
    both = [key for key in DECIDING if key in then and key in now]
    other = [f"{key}: {then[key]} -> {now[key]}" for key in both if then[key] != now[key]]
    noticed = []
    if not other:
        pairs = _common(then.get("sample", ()), now.get("sample", ()))
        changed = sum(a != b for a, b in pairs)
        text = f"the contents of {changed} of {len(pairs)} examples looked at have changed"
        # Most contents differ: another data set. Fewer: some files were mended or recompressed.
        if 2 * changed > len(pairs):
            other.append(f"{text}, under the same names")
        elif changed:
            noticed.append(text)
        # Weaker than contents: it may differ where no sampled example does.
        elif "sizes" in then and "sizes" in now and then["sizes"] != now["sizes"]:
            noticed.append("some files have other sizes")
    return other, noticed


def _common(then: Iterable[Sequence[int]], now: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """Returns pairs of checksums of the examples that both have looked at.

    A set in another format may be sampled elsewhere: a stream is, at the beginnings of its files.
    """
    known = {index: crc for index, crc in then}
    return [(known[index], crc) for index, crc in now if index in known]
