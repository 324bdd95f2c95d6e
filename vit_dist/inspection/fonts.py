"""Finds a font for a character: the one that comes with Pillow, else a font of this machine.

Pillow's own font has ASCII and little more; it draws an empty box for an "é". Which characters
another font file has is read from its table "cmap" (OpenType specification, "cmap - Character to
Glyph Index Mapping Table"), so that only files that will be used are opened as fonts.
"""

import functools
import struct
import unicodedata
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ImageFont

SIZE = 12  # pixels
# Where Linux, macOS and Windows keep fonts.
FOLDERS = (
    "~/.fonts",
    "~/.local/share/fonts",
    "/usr/local/share/fonts",
    "/usr/share/fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
    "C:/Windows/Fonts",
)
_SUFFIXES = (".ttf", ".otf", ".ttc")
# Parts of file names. A font with one is taken only if no plainer font has the character.
_STYLES = ("bold", "italic", "oblique", "mono", "condensed", "serif", "light", "thin", "black")
# Parts of the names of fonts that draw a box for every character.
_USELESS = ("lastresort", "notdef")
# Unicode will never assign this code, so a font draws its box for it: the shape of "not there".
_NO_CHARACTER = "\uffff"


class Font:
    """A font of SIZE, which knows the characters that it has."""

    def __init__(self, draws: ImageFont.FreeTypeFont, tells: ImageFont.FreeTypeFont):
        """`draws` may join letters as their script wants; `tells` shapes each letter by itself."""
        self.draws = draws
        self._tells = tells
        self._box = self._shape(_NO_CHARACTER)

    def has(self, character: str) -> bool:
        """Whether the font draws a character: not its box, and not nothing unless it is blank."""
        shape = self._shape(character)
        blank = character.isspace() or is_invisible(character)
        # A font that has only coloured glyphs, such as emoji, draws nothing in black and white.
        return shape != self._box and (blank or any(shape[0]))

    def _shape(self, character: str) -> tuple:
        mask, offset = self._tells.getmask2(character)
        return bytes(mask), mask.size, offset, self._tells.getlength(character)


def is_invisible(character: str) -> bool:
    """Whether it only shapes its neighbours: joiners, marks of direction, selectors of variants."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


@functools.cache
def plain_font() -> Font:
    """The font that comes with Pillow: the same on every machine."""
    font = ImageFont.load_default(SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return Font(font, font)


@functools.cache
def find_font(text: str) -> Font | None:
    """The plainest font that has every character of a text; None if no font here has."""
    if all(map(plain_font().has, text)):
        return plain_font()
    # First by the table of each file, which is fast; then by what the font really draws.
    for path in _font_files(FOLDERS):
        if all(any(a <= ord(c) <= b for a, b in _ranges(path)) for c in text):
            font = _open(path)
            if font is not None and all(map(font.has, text)):
                return font
    return None


@functools.cache
def _font_files(folders: tuple[str, ...]) -> tuple[Path, ...]:
    found = {
        path
        for folder in folders
        for path in Path(folder).expanduser().rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and not any(word in path.stem.lower() for word in _USELESS)
    }
    return tuple(sorted(found, key=_plainness))


def _plainness(path: Path) -> tuple[int, int, str]:
    # Few style words, then a short name; the path makes the order the same at every start.
    name = path.stem.lower()
    return sum(style in name for style in _STYLES), len(name), str(path)


@functools.cache
def _open(path: Path) -> Font | None:
    try:
        # Where letters are joined, as in Arabic, the result does not tell which one a font lacks;
        # the basic layout joins nothing.
        tells = ImageFont.truetype(str(path), SIZE, layout_engine=ImageFont.Layout.BASIC)
        return Font(ImageFont.truetype(str(path), SIZE), tells)
    # A damaged file, or bitmaps in other sizes, as some emoji fonts are: another font may do.
    except OSError:
        return None


@functools.cache
def _ranges(path: Path) -> tuple[tuple[int, int], ...]:
    """Ranges (first, last) of the code points that a font file has; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return tuple(_read_ranges(file))
    except (OSError, struct.error):
        return ()


def _read_ranges(file: BinaryIO) -> list[tuple[int, int]]:
    # Big-endian numbers at a byte of the file; `layout` is struct's.
    def numbers(layout: str, at: int) -> tuple[Any, ...]:
        file.seek(at)
        return struct.unpack(f">{layout}", file.read(struct.calcsize(f">{layout}")))

    # A collection (.ttc) begins with the offsets of its fonts. Pillow, too, takes the first.
    start = numbers("I", 12)[0] if file.read(4) == b"ttcf" else 0
    tables = {}
    # The directory: a number of tables, then 16 bytes for each.
    for i in range(numbers("H", start + 4)[0]):
        tag, _, offset, _ = numbers("4s3I", start + 12 + 16 * i)
        tables[tag] = offset
    if b"cmap" not in tables:
        return []
    table, ranges = tables[b"cmap"], list[tuple[int, int]]()
    for i in range(numbers("H", table + 2)[0]):
        platform, encoding, offset = numbers("HHI", table + 4 + 8 * i)
        # Unicode's tables: platform 0, and 3 (Windows) with encodings 1 and 10.
        if platform != 0 and (platform, encoding) not in ((3, 1), (3, 10)):
            continue
        at = table + offset
        kind = numbers("H", at)[0]
        # Format 4, code points of 16 bits: all ends of ranges, 2 bytes of padding, all starts.
        if kind == 4:
            count = numbers("H", at + 6)[0] // 2
            ends = numbers(f"{count}H", at + 14)
            ranges += zip(numbers(f"{count}H", at + 16 + 2 * count), ends, strict=True)
        # Format 12, of 32 bits: (first, last, glyph) for each range.
        elif kind == 12:
            count = numbers("I", at + 12)[0]
            found = numbers(f"{3 * count}I", at + 16)
            ranges += zip(found[::3], found[1::3], strict=True)
    return ranges
