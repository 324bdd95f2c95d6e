"""Text in pictures: in every script for which this machine has a font, spelt out in all others.

A character that no font here has is replaced by the letter without its accents if that is ASCII,
else by its code, such as U+6F22.
"""

import bisect
import functools
import itertools
import operator
import unicodedata
from collections.abc import Iterable

from PIL import ImageDraw

from vit_dist.inspection.fonts import SIZE, Font, find_font, is_invisible, plain_font

# Pixels: room for tails below the baseline, and for accents above a capital.
LINE_HEIGHT = SIZE + 6
# Pixels from the top of the line. Pieces of different fonts stand on one baseline.
_BASELINE = SIZE + 1


def draw_text(draw: ImageDraw.ImageDraw, position: tuple[float, float], text: str) -> None:
    """Draws a line of black text, LINE_HEIGHT high, whose top left corner is at `position`."""
    left, top = position
    for piece, font in _pieces(text):
        draw.text((left, top + _BASELINE), piece, font=font.draws, fill="black", anchor="ls")
        left += font.draws.getlength(piece)


def text_width(text: str) -> float:
    """The width of a line of text in pixels."""
    return sum(font.draws.getlength(piece) for piece, font in _pieces(text))


def shortened(text: str, width: float) -> str:
    """The text, or as much of its beginning as fits into `width` pixels, and "..."."""
    if text_width(text) <= width:
        return text
    # A binary search: the width grows with the number of characters.
    lengths = range(1, len(text))
    fitting = bisect.bisect_right(lengths, width, key=lambda n: text_width(f"{text[:n]}..."))
    return text[:fitting].rstrip() + "..."


def undrawable(texts: Iterable[str]) -> str:
    """The characters of `texts` that no font here has, each once."""
    characters = dict.fromkeys("".join(map(_composed, texts)))
    return "".join(c for c in characters if not is_invisible(c) and _font_of(c) is None)


@functools.cache
def _pieces(text: str) -> tuple[tuple[str, Font], ...]:
    """Cuts a text where its font changes: (piece, font that has all of it)."""
    text = _composed(text)
    # One font for the whole text, if there is one, looks better than several.
    visible = [c for c in text if not is_invisible(c)]
    whole = find_font("".join(visible)) if all(map(_drawable, visible)) else None
    shown, font = [], whole or plain_font()
    for character in text:
        if is_invisible(character):
            character = character if font.has(character) else ""
        # The font stays until a character needs another: letters that join, as in Arabic, have to
        # be drawn in one piece.
        elif not (_drawable(character) and font.has(character)):
            found = _font_of(character)
            font = found or plain_font()
            character = character if found else _spelt(character)
        shown.append((character, font))
    groups = itertools.groupby(shown, key=operator.itemgetter(1))
    return tuple(("".join(character for character, _ in group), font) for font, group in groups)


def _composed(text: str) -> str:
    """One character for a letter with its accent, if Unicode has one; names from macOS have two."""
    return unicodedata.normalize("NFC", text)


def _drawable(character: str) -> bool:
    """False for control characters, which break the line, and for halves of surrogate pairs."""
    return unicodedata.category(character) not in ("Cc", "Cs")


def _font_of(character: str) -> Font | None:
    return find_font(character) if _drawable(character) else None


def _spelt(character: str) -> str:
    plain = unicodedata.normalize("NFD", character)[0]
    if plain.isascii() and plain.isalpha():
        return plain
    return " " if character.isspace() else f"U+{ord(character):04X} "
