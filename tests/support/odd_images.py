"""Image files of kinds that Pillow reads and does not write, byte by byte: BMP, PNG, GIF, JPEG."""

import io
import struct
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """A file as Pillow writes it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes, mode: str = "RGB") -> np.ndarray:
    """The first frame as Pillow reads it, as int."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert(mode)).astype(int)


def bmp(
    numbers: np.ndarray,
    bits: int,
    *,
    palette: np.ndarray | None = None,
    compression: int = 0,
    header: int = 40,
    masks: Iterable[int] = (),
    stream: bytes | None = None,
    top_down: bool = False,
    gap: int = 0,
) -> bytes:
    """A BMP.

    Args:
      numbers: (H, W) of each pixel's bits.
      bits: 1, 2, 4, 8, 16, 24 or 32.
      palette: (n, 3) uint8, red first.
      compression: 0; 1 and 2 (runs) with `stream`, 3 with `masks`.
      header: 12 (OS/2), 40, 52, 56, 108 or 124 bytes.
      masks: Of red, green, blue and perhaps alpha.
      stream: What stands in place of the rows.
      top_down: Whether the first row comes first.
      gap: Bytes between the header and the pixels.
    """
    height, width = numbers.shape
    rows = numbers if top_down else numbers[::-1]
    if stream is None:
        shifts = np.arange(bits - 1, -1, -1)
        digits = (rows[..., None].astype(np.int64) >> shifts) & 1
        packed = [np.packbits(row.ravel()).tobytes() for row in digits]
        if bits > 8:  # the lowest byte comes first
            size = bits // 8
            packed = [
                b"".join(row[i : i + size][::-1] for i in range(0, len(row), size))
                for row in packed
            ]
        stream = b"".join(row + b"\0" * (-len(row) % 4) for row in packed)
    own = b"".join(struct.pack("<I", mask) for mask in masks)
    table = b""
    if palette is not None:
        end = b"" if header == 12 else b"\0"
        table = b"".join(bytes(color[::-1]) + end for color in palette.astype(np.uint8).tolist())
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        colors = 0 if palette is None else len(palette)
        signed = -height if top_down else height
        info = struct.pack(
            "<IiiHHIIiiII",
            header,
            width,
            signed,
            1,
            bits,
            compression,
            len(stream),
            0,
            0,
            colors,
            0,
        )
        info += (own + b"\0" * header)[: header - 40] if header > 40 else own
    start = 14 + len(info) + len(table) + gap
    front = b"BM" + struct.pack("<IHHI", start + len(stream), 0, 0, start)
    return front + info + table + b"\0" * gap + stream


def png(numbers: np.ndarray, depth: int, color_type: int, **chunks: bytes) -> bytes:
    """A PNG of (H, W) or (H, W, C) numbers of `depth` bits each.

    Args:
      numbers: As the type of colour says: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA.
      depth: 1, 2, 4, 8 or 16.
      color_type: Of the PNG specification.
      **chunks: Name -> bytes of a chunk before the pixels.
    """
    height, width = numbers.shape[:2]
    digits = (numbers[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    rows = b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in digits)
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    parts = [("IHDR", header), *chunks.items(), ("IDAT", zlib.compress(rows)), ("IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name.encode(), data) for name, data in parts)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def interlaced_png(pixels: np.ndarray) -> bytes:
    """Adam7, 8 bits of RGB: seven images within the image, each of other pixels."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    rows = b""
    for top, left, down, across in (*passes, (1, 0, 2, 1)):
        part = pixels[top::down, left::across]
        rows += b"".join(b"\0" + row.tobytes() for row in part) if part.size else b""
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def on_screen(
    data: bytes,
    size: tuple[int, int],
    *,
    place: tuple[int, int] = (0, 0),
    transparent: int | None = None,
    background: int = 0,
    extension: bytes = b"",
) -> bytes:
    """A GIF of Pillow's with one frame, put on a screen of another (width, height).

    Args:
      data: With a palette for all frames and none of the frame.
      size: Of the screen.
      place: Where the frame lies: left, top.
      transparent: Number of the transparent colour.
      background: The screen's colour, which nobody shows.
      extension: A block to put before the frame.
    """
    screen = bytearray(data[:13])
    screen[6:10], screen[11] = struct.pack("<HH", *size), background
    end = 13 + (6 << (screen[10] & 7))
    begin = data.index(b"\x2c", end)
    control = b"" if transparent is None else bytes((0x21, 0xF9, 4, 1, 0, 0, transparent, 0))
    frame = b"\x2c" + struct.pack("<HH", *place) + data[begin + 5 :]
    return bytes(screen) + data[13:end] + extension + control + frame


def with_own_palette(data: bytes, *, keep_shared: bool) -> bytes:
    """A GIF of Pillow's whose palette is the frame's; the shared one, if kept, is turned round."""
    size = 6 << (data[10] & 7)
    palette, begin = data[13 : 13 + size], data.index(b"\x2c", 13 + size)
    screen = bytearray(data[:13])
    if not keep_shared:
        screen[10] &= 0x7F
    frame = bytearray(data[begin : begin + 10])
    frame[9] |= 0x80 | (data[10] & 7)
    shared = palette[::-1] if keep_shared else b""
    between = data[13 + size : begin]
    return bytes(screen) + shared + between + bytes(frame) + palette + data[begin + 10 :]


def animated_webp(
    frame: bytes, canvas: tuple[int, int], place: tuple[int, int], *, alpha: bool
) -> bytes:
    """A WebP whose one frame, a still WebP of Pillow's, lies on a larger (width, height).

    Args:
      frame: A file.
      canvas: Its width and height.
      place: Left and top of the frame there; even.
      alpha: Whether the file says that it has some.
    """

    def three(value: int) -> bytes:
        return struct.pack("<I", value)[:3]

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    with Image.open(io.BytesIO(frame)) as image:
        width, height = image.size
    parts = frame[12:]
    if parts.startswith(b"VP8X"):
        parts = parts[18:]
    head = three(place[0] // 2) + three(place[1] // 2) + three(width - 1) + three(height - 1)
    flags = struct.pack("<I", 0x02 | (0x10 if alpha else 0))
    body = b"WEBP" + chunk(b"VP8X", flags + three(canvas[0] - 1) + three(canvas[1] - 1))
    body += chunk(b"ANIM", b"\xff\xff\xff\xff\0\0")
    body += chunk(b"ANMF", head + three(100) + b"\0" + parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def without_adobe(data: bytes) -> bytes:
    """A JPEG of Pillow's without Adobe's marker."""
    begin = data.index(b"Adobe") - 4
    return data[:begin] + data[begin + 2 + struct.unpack(">H", data[begin + 2 : begin + 4])[0] :]
