"""Prepares Fashion-MNIST for TFDS without a network, from Debian's package dataset-fashion-mnist.

    python tools/fashion_mnist.py --data_dir=data --file_format=array_record

TFDS takes files from <data_dir>/downloads/manual if their checksums are those of the original
download. Debian has the same compressed bytes, but without the file name and the time in the gzip
headers: this command puts both back.
"""

import hashlib
import struct

from absl import app, flags, logging
from etils import epath

from vit_dist.data.sources.open import open_source

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Where TFDS keeps prepared data sets.")
flags.DEFINE_string(
    "source_dir", "/usr/share/datasets/fashion-mnist", "Where the package put its *.gz files."
)
flags.DEFINE_enum(
    "file_format",
    "array_record",
    ["array_record", "tfrecord"],
    "array_record is read by index, tfrecord streamed.",
)

# Name -> time in the original gzip header (seconds since 1970: 31 August 2017) and the SHA-256 of
# the original file, as in TFDS's url_checksums/fashion_mnist.txt.
FILES = {
    "train-images-idx3-ubyte": (
        1504176606,
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    "train-labels-idx1-ubyte": (
        1504176606,
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    "t10k-images-idx3-ubyte": (
        1504176627,
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    "t10k-labels-idx1-ubyte": (
        1504176627,
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}
# Of the fixed 10 bytes of a gzip header (RFC 1952): where the flags and the time begin, its size,
# and the flag that says that a file name follows.
FLAGS_AT, TIME_AT, HEADER_SIZE, FNAME = 3, 4, 10, 8


def restore_header(packed: bytes, *, name: str, mtime: int) -> bytes:
    """Returns the gzip file `packed`, which has no optional header fields, with name and time set.

    Raises:
      ValueError: `packed` is no such file.
    """
    if packed[:2] != b"\x1f\x8b" or packed[FLAGS_AT] != 0:
        raise ValueError(f"{name}.gz is not a gzip file with a bare header")
    # The name, ended by a zero byte, comes behind the fixed part and before the compressed data.
    return (
        packed[:FLAGS_AT]
        + bytes([FNAME])
        + struct.pack("<I", mtime)
        + packed[TIME_AT + 4 : HEADER_SIZE]
        + name.encode()
        + b"\0"
        + packed[HEADER_SIZE:]
    )


def restore(source_dir: epath.PathLike, *, manual_dir: epath.PathLike) -> None:
    """Writes the four original files into `manual_dir`.

    Raises:
      FileNotFoundError: A file is missing in `source_dir`.
      ValueError: A restored file is not, byte for byte, the original.
    """
    out = epath.Path(manual_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name, (mtime, sha256) in FILES.items():
        packed = epath.Path(source_dir) / f"{name}.gz"
        if not packed.exists():
            raise FileNotFoundError(
                f"{packed} does not exist: install dataset-fashion-mnist or set --source_dir"
            )
        # Compared before it is written: only the original, to the byte, may get among TFDS's files.
        original = restore_header(packed.read_bytes(), name=name, mtime=mtime)
        found = hashlib.sha256(original).hexdigest()
        if found != sha256:
            raise ValueError(
                f"{packed} does not restore to the original: its SHA-256 is {found}, expected "
                f"{sha256}; is it another version of the package?"
            )
        (out / f"{name}.gz").write_bytes(original)


def prepare(data_dir: str, *, source_dir: str, file_format: str) -> list[str]:
    """Restores the files and prepares the set in `data_dir`; returns a line for each split."""
    root = epath.Path(data_dir).expanduser()
    restore(source_dir, manual_dir=root / "downloads" / "manual")
    lines = []
    for split in ("train", "test"):
        source = open_source(
            "tfds",
            split=split,
            name="fashion_mnist",
            data_dir=str(root),
            file_format=file_format,
        )
        lines.append(f"{source}: {source.num_examples} examples, {source.num_classes} classes")
    return lines


def main(argv: list[str]) -> None:
    """Runs the command."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    lines = prepare(FLAGS.data_dir, source_dir=FLAGS.source_dir, file_format=FLAGS.file_format)
    print("\n".join(lines))


if __name__ == "__main__":
    flags.mark_flag_as_required("data_dir")
    app.run(main)
