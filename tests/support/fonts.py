"""Fonts made by hand, with only the characters that a test wants: machines have different ones."""

import struct

EM = 1000  # font units in a font's size


def make_font(characters, *, kind=4):
    """The bytes of a TrueType font (OpenType specification 1.9) that has these characters.

    Each is a triangle, the higher the later it comes; what the font lacks is drawn as a square.

    Args:
      characters: a string.
      kind: format of its table of characters: 4 (16 bits) or 12 (32 bits).
    """
    box = [(100, 0), (100, 700), (700, 700), (700, 0)]
    triangles = [
        [(100, 0), (400, 300 + 400 * i // len(characters)), (700, 0)]
        for i in range(len(characters))
    ]
    glyphs = [_glyph(points) for points in [box, *triangles]]
    ends = [sum(map(len, glyphs[:i])) for i in range(len(glyphs) + 1)]
    tables = {
        b"cmap": _cmap(sorted((ord(c), i + 1) for i, c in enumerate(characters)), kind),
        b"glyf": b"".join(glyphs),
        b"head": struct.pack(
            ">4I2H2q4h2H3h", 0x10000, 0, 0, 0x5F0F3CF5, 0, EM, 0, 0, 0, 0, 700, 700, 0, 8, 2, 1, 0
        ),
        b"hhea": struct.pack(">I3hH11hH", 0x10000, 800, -200, 0, 800, *[0] * 11, len(glyphs)),
        b"hmtx": struct.pack(">Hh", 800, 100) * len(glyphs),
        b"loca": struct.pack(f">{len(ends)}I", *ends),
        b"maxp": struct.pack(">I14H", 0x10000, len(glyphs), 4, 1, *[0] * 11),
    }
    head = struct.pack(">I4H", 0x10000, len(tables), 0, 0, 0)
    offset, directory, body = 12 + 16 * len(tables), b"", b""
    for tag, data in tables.items():
        directory += struct.pack(">4s3I", tag, 0, offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    return head + directory + body


def as_collection(font):
    """A .ttc of one font; its tables' offsets move by the collection's head."""
    head = struct.pack(">4sIII", b"ttcf", 0x10000, 1, 16)
    moved = bytearray(font)
    for i in range(struct.unpack_from(">H", font, 4)[0]):
        at = 12 + 16 * i + 8
        struct.pack_into(">I", moved, at, struct.unpack_from(">I", font, at)[0] + len(head))
    return head + bytes(moved)


def _glyph(points):
    """One closed outline of straight lines."""
    xs, ys = zip(*points, strict=True)
    steps = [
        struct.pack(f">{len(v)}h", *(b - a for a, b in zip((0, *v[:-1]), v, strict=True)))
        for v in (xs, ys)
    ]
    data = struct.pack(">5hHH", 1, min(xs), min(ys), max(xs), max(ys), len(points) - 1, 0)
    data += bytes([1] * len(points)) + b"".join(steps)  # 1: on the curve, coordinates of 16 bits
    return data + bytes(-len(data) % 4)


def _cmap(pairs, kind):
    """One range for each (code point, glyph)."""
    if kind == 12:
        groups = b"".join(struct.pack(">3I", code, code, glyph) for code, glyph in pairs)
        table = struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(pairs)) + groups
        return struct.pack(">HHHHI", 0, 1, 3, 10, 12) + table
    codes = [code for code, _ in pairs] + [0xFFFF]
    deltas = [(glyph - code) % 65536 for code, glyph in pairs] + [1]
    count = len(codes)
    words = [*codes, 0, *codes, *deltas, *[0] * count]
    table = struct.pack(">7H", 4, 16 + 8 * count, 0, 2 * count, 0, 0, 0)
    return struct.pack(">HHHHI", 0, 1, 3, 1, 12) + table + struct.pack(f">{len(words)}H", *words)
