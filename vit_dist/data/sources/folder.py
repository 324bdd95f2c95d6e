"""A source of image files, one directory per class."""

import hashlib
import random
from concurrent import futures

import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath

from vit_dist.data.sources import source as base

# What tf.io.decode_image decodes; WebP only since TensorFlow 2.19.
EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif") + (
    ("webp",) if hasattr(tf.io, "decode_webp") else ()
)
# The first bytes of such files, whatever their extension says.
MAGIC_NUMBERS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF87a", b"GIF89a", b"RIFF")
# With NUM_THREADS this many are checked in seconds, also where each opening waits for a network.
MAX_HEADERS = 20_000
NUM_THREADS = 32  # for listing and header checks, which wait rather than compute


class FolderSource(base.Source):
    """Images in class directories: `data_dir/<split>/<class>/*` or `data_dir/<class>/*`.

    The first layout is taken when `data_dir/train` is a directory, and the fractions have no effect
    then. In the second the splits are "train", "val" and "test": within each class the files are
    ordered by the SHA-1 of "<class>/<file>"; the first `val_fraction` of them are "val", the next
    `test_fraction` are "test". So a split depends on names alone, not on how a file system lists.

    Classes are the directories of the train split, sorted. Hidden files are ignored.

    Args:
      split: The split to open.
      data_dir: A local path, or one that `etils.epath` reads, such as gs://bucket/path.
      val_fraction: Share of each class in "val", in [0, 1).
      test_fraction: Share of each class in "test", in [0, 1).
      check_files: Whether to read the first bytes of the files at opening.

    Raises:
      FileNotFoundError: `data_dir` is no directory.
      ValueError: There is no class, an empty one, one that train lacks, no image in the split, a
        file that is not an image (all are checked up to 20,000, and else a sample of that size).
    """

    name = "folder"

    def __init__(
        self,
        split: str,
        data_dir: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        check_files: bool = True,
    ):
        self.split = split
        self.data_dir = epath.Path(data_dir).expanduser()
        if not self.data_dir.is_dir():
            raise FileNotFoundError(
                f"data_dir {str(data_dir)!r} is not a directory; it should hold "
                "train/<class>/*.jpg or <class>/*.jpg"
            )
        if (self.data_dir / "train").is_dir():
            files = self._files_of_split_directory()
        else:
            files = self._files_by_fraction(val_fraction, test_fraction)
        names = {name: label for label, name in enumerate(self.class_names)}
        paths = [(f"{folder}/{file}", names[folder]) for folder in files for file in files[folder]]
        if not paths:
            raise ValueError(
                f"split {split!r} of {self.data_dir} holds no image: with a val_fraction of "
                f"{val_fraction} and a test_fraction of {test_fraction} no class is large enough; "
                "raise the fraction or open another split"
            )
        self.paths = np.array([f"{self._root}/{path}" for path, _ in paths])
        self.labels = np.array([label for _, label in paths], np.int32)
        self.num_examples = len(paths)
        self.element_spec = {
            "image": tf.TensorSpec((), tf.string),
            "label": tf.TensorSpec((), tf.int32),
            "path": tf.TensorSpec((), tf.string),
        }
        self._tables: dict[str, tf.Tensor] | None = None
        if check_files:
            _check_headers(self.paths.tolist())

    def _files_of_split_directory(self) -> dict[str, list[str]]:
        splits = [path.name for path in _directories(self.data_dir)]
        if self.split not in splits:
            raise ValueError(f"{self.data_dir} has no split {self.split!r}; it has {splits}")
        self._root = self.data_dir / self.split
        self.class_names = _class_names(self.data_dir / "train")
        own = _class_names(self._root)
        unknown = sorted(set(own) - set(self.class_names))
        if unknown:
            raise ValueError(
                f"{self._root} has classes which {self.data_dir / 'train'} lacks: {unknown[:5]}; "
                "their labels would be unknown: add them to train or remove them here"
            )
        return _list_images(self._root, own)

    def _files_by_fraction(self, val: float, test: float) -> dict[str, list[str]]:
        if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
            raise ValueError(
                f"val_fraction={val} and test_fraction={test}: each must be in [0, 1), and so must "
                "their sum"
            )
        splits = ("train", "val", "test")
        if self.split not in splits:
            raise ValueError(f"source 'folder' has no split {self.split!r}; it has {list(splits)}")
        self._root = self.data_dir
        self.class_names = _class_names(self.data_dir)
        files = _list_images(self.data_dir, self.class_names)
        return {name: _part(name, files[name], self.split, val, test) for name in files}

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        if self._tables is None:
            self._tables = base.on_host(
                lambda: {"path": tf.constant(self.paths), "label": tf.constant(self.labels)}
            )
        return {key: tf.gather(table, indices) for key, table in self._tables.items()}

    def decode_record(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {**record, "image": tf.io.read_file(record["path"])}

    def load(self, index: int) -> tuple[bytes, int]:
        return epath.Path(self.paths[index]).read_bytes(), int(self.labels[index])

    def names(self) -> list[str]:
        return [path.removeprefix(f"{self._root}/") for path in self.paths.tolist()]

    def describe(self, index: int) -> str:
        return f"image file {str(self.paths[index])!r} (example {index} of {self})"


def _directories(path: epath.Path) -> list[epath.Path]:
    found = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    return sorted(entry for entry in found if entry.is_dir())


def _class_names(root: epath.Path) -> tuple[str, ...]:
    names = tuple(path.name for path in _directories(root))
    if not names:
        raise ValueError(
            f"{root} has no class directories; it should hold one directory of images per class"
        )
    return names


def _list_images(root: epath.Path, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Returns class -> sorted names of its image files."""
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        listed = pool.map(lambda name: sorted(p.name for p in (root / name).iterdir()), names)
    files = {}
    for name, entries in zip(names, listed, strict=True):
        entries = [entry for entry in entries if not entry.startswith(".")]
        files[name] = [entry for entry in entries if _extension(entry) in EXTENSIONS]
        others = sorted(set(entries) - set(files[name]))
        if not files[name]:
            raise ValueError(
                f"class directory {root / name} holds no image"
                + (f" (it holds e.g. {others[0]!r})" if others else "")
                + f"; supported are {', '.join(EXTENSIONS)}: convert the files, or remove it"
            )
        if others:
            logging.warning("%s: ignored %d files, e.g. %r", root / name, len(others), others[0])
    return files


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _part(name: str, files: list[str], split: str, val: float, test: float) -> list[str]:
    """Returns the files (sorted) of class `name` that belong to `split`."""
    ranked = sorted(files, key=lambda file: hashlib.sha1(f"{name}/{file}".encode()).digest())
    num_val, num_test = round(val * len(files)), round(test * len(files))
    part = {
        "val": ranked[:num_val],
        "test": ranked[num_val : num_val + num_test],
        "train": ranked[num_val + num_test :],
    }
    return sorted(part[split])


def _check_headers(paths: list[str]) -> None:
    """Raises ValueError for the first file that is empty or is no image by its first bytes."""
    if len(paths) > MAX_HEADERS:
        logging.info("checking the headers of %d of %d images", MAX_HEADERS, len(paths))
        paths = random.Random(0).sample(paths, MAX_HEADERS)
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for path, problem in zip(paths, pool.map(_header_problem, paths), strict=True):
            if problem:
                raise ValueError(f"image file {path!r} {problem}; replace it or remove it")


def _header_problem(path: str) -> str | None:
    try:
        with epath.Path(path).open("rb") as file:
            header = file.read(8)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if not header:
        return "is empty"
    if not header.startswith(MAGIC_NUMBERS):
        return f"is not an image: it begins with {header!r}"
    return None
