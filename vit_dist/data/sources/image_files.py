"""Kinds of image files: those that TensorFlow decodes, and others that users have."""

import collections
from collections.abc import Iterable

import tensorflow as tf

# What tf.io.decode_image decodes; WebP only since TensorFlow 2.19.
EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif") + (
    ("webp",) if hasattr(tf.io, "decode_webp") else ()
)
HEADER_BYTES = 12  # as far as the longest of the signatures below reaches

# How files begin that TensorFlow decodes, whatever their extension says. WebP is checked apart: its
# container, RIFF, also holds sounds and videos, and only bytes 8 to 11 tell which.
_DECODED = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF87a", b"GIF89a")

# Other kinds that are common among photographs: what they are called, how they end.
OTHERS = {
    "HEIC": ("heic", "heif", "hif"),
    "AVIF": ("avif", "avifs"),
    "TIFF": ("tif", "tiff"),
    "JPEG XL": ("jxl",),
    "JPEG 2000": ("jp2", "j2k", "jpx"),
    "camera raw": ("cr2", "cr3", "nef", "arw", "dng", "orf", "rw2", "raf"),
    "SVG": ("svg",),
    "Photoshop": ("psd",),
    "ICO": ("ico",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
# (first bytes, where they stand, kind)
_SIGNATURES = (
    (b"ftypheic", 4, "HEIC"),
    (b"ftypheix", 4, "HEIC"),
    (b"ftyphevc", 4, "HEIC"),
    (b"ftypmif1", 4, "HEIC"),
    (b"ftypmsf1", 4, "HEIC"),
    (b"ftypavif", 4, "AVIF"),
    (b"ftypavis", 4, "AVIF"),
    (b"ftypcrx ", 4, "camera raw"),
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
    (b"\xff\x0a", 0, "JPEG XL"),
    (b"\0\0\0\x0cJXL ", 0, "JPEG XL"),
    (b"\0\0\0\x0cjP  ", 0, "JPEG 2000"),
    (b"8BPS", 0, "Photoshop"),
    (b"<svg", 0, "SVG"),
    (b"\0\0\1\0", 0, "ICO"),
    (b"P5\n", 0, "PPM"),
    (b"P6\n", 0, "PPM"),
    (b"%PDF", 0, "PDF"),
    (b"PK\3\4", 0, "ZIP"),
    (b"\x1f\x8b", 0, "GZIP"),
    # What git-lfs leaves in place of a file that was not fetched.
    (b"version http", 0, "Git LFS pointer"),
)
_BY_EXTENSION = {ending: kind for kind, endings in OTHERS.items() for ending in endings}


def extension(name: str) -> str:
    """Returns how a file's name ends, in lower case and without the dot."""
    return name.rpartition(".")[2].lower()


def is_image(name: str) -> bool:
    """Whether the name is that of an image which TensorFlow decodes."""
    return "." in name and extension(name) in EXTENSIONS


def kind_of_name(name: str) -> str:
    """Returns what kind of file a name stands for, e.g. "HEIC" or ".txt"."""
    ending = extension(name) if "." in name else ""
    return _BY_EXTENSION.get(ending) or (f".{ending}" if ending else "no extension")


def count_kinds(names: Iterable[str]) -> str:
    """Returns e.g. "12 HEIC, 3 TIFF, 1 .txt" of names of files."""
    kinds = collections.Counter(kind_of_name(name) for name in names)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def header_problem(header: bytes) -> str | None:
    """Returns why a file that begins with `header` (HEADER_BYTES of it) is no image, else None."""
    if not header:
        return "is empty"
    if header.startswith(_DECODED) or (header.startswith(b"RIFF") and header[8:12] == b"WEBP"):
        return None
    for signature, at, kind in _SIGNATURES:
        if header[at:].startswith(signature):
            # "an AVIF", "an ICO": kinds are spelt out or begin with a vowel.
            article = "an" if kind[0] in "AEI" else "a"
            return f"is {article} {kind} file, which TensorFlow does not decode: convert it"
    return f"is not an image: it begins with {header[:8]!r}"
