"""A source of image files, one directory per class."""

import hashlib
import os
import random
import zlib
from collections.abc import Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf
from absl import logging
from etils import epath

from vit_dist import paths
from vit_dist.config.binding import look_alike
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.sources import source as base
from vit_dist.data.sources.fingerprint import checksum, printable
from vit_dist.data.sources.image_files import (
    EXTENSIONS,
    HEADER_BYTES,
    count_kinds,
    header_problem,
    is_image,
)
from vit_dist.data.sources.label_sets import as_row, read_label_sets

# So many first bytes are read in seconds by NUM_THREADS threads, also over a network.
MAX_HEADERS = 20_000
NUM_THREADS = 32  # for listing, sizes and header checks, which wait rather than compute
MAX_NAMED = 50  # damaged files in one message
SPLITS = ("train", "val", "test")  # of a folder without directories for splits


class FolderSource(base.Source):
    """Images in class directories: `data_dir/<split>/<class>/*` or `data_dir/<class>/*`.

    The first layout is taken when `data_dir/<train_split>` or `data_dir/<split>` holds directories,
    and the fractions have no effect then. In the second the splits are "train", "val" and "test":
    within each class the files are ordered by the SHA-1 of "<class>/<file>"; the first
    `val_fraction` of them are "val", the next `test_fraction` are "test". So a split depends on
    names alone, not on how a file system lists.

    Classes are the directories of the train split, sorted; of the split itself, where there is no
    train split. Hidden files are ignored.

    Args:
      split: The split to open.
      data_dir: A local path, or one that `etils.epath` reads, such as gs://bucket/path.
      train_split: The split whose directories are the classes.
      val_fraction: Share of each class in "val", in [0, 1).
      test_fraction: Share of each class in "test", in [0, 1).
      check_files: Whether to read the first bytes of the files at opening.
      label_file: JSON with a set of labels by file, in the place of the directories' labels; see
        label_sets.read_label_sets.

    Raises:
      ConfigError: `data_dir` is no directory, or there is no such split.
      DataError: There is no class, an empty one, one that train lacks, no image in the split,
        files that are not images (all are checked up to 20,000, and else a sample of that size).
    """

    name = "folder"

    def __init__(
        self,
        split: str,
        data_dir: str,
        train_split: str = "train",
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        check_files: bool = True,
        label_file: str | None = None,
    ):
        self.split, self._train_split = split, train_split
        self.data_dir = paths.expand(data_dir)
        # Before anything is listed, as the message can say what the folder should hold.
        if not self.data_dir.is_dir():
            raise ConfigError(
                f"data_dir {str(data_dir)!r} is not a directory; it should hold "
                "train/<class>/*.jpg or <class>/*.jpg"
            )
        # One directory of a split is enough to choose the first layout: where only val/ exists,
        # train is a split that is missing, and val is not a class.
        if any(_is_split(self.data_dir / name) for name in {train_split, split, *SPLITS}):
            files = self._files_of_split_directory()
        else:
            files = self._files_by_fraction(val_fraction, test_fraction)
        # Class directory -> label. By the names on the disk, which need not be UTF-8, while
        # class_names are printable.
        numbers = {name: label for label, name in enumerate(self._folders)}
        found = [
            (f"{folder}/{file}", numbers[folder]) for folder in files for file in files[folder]
        ]
        if not found:
            raise ConfigError(
                f"split {split!r} of {self.data_dir} holds no image: with a val_fraction of "
                f"{val_fraction} and a test_fraction of {test_fraction} no class is large enough; "
                "raise the fraction or open another split"
            )
        self.class_names = base.distinct_names([printable(name) for name in self._folders])
        if twins := look_alike(self.class_names, self.class_names):
            logging.warning("%s may hold a class twice%s", self._root, twins)
        # One numpy array: a list of a million strings takes several times the memory.
        self.paths = np.array([f"{self._root}/{path}" for path, _ in found])
        self.labels = np.array([label for _, label in found], np.int32)
        self.num_examples = len(found)
        self.element_spec = {
            "image": tf.TensorSpec((), tf.string),
            "label": tf.TensorSpec((), tf.int32),
            "path": tf.TensorSpec((), tf.string),
        }
        self._tables: dict[str, tf.Tensor] | None = None
        # What "label" is made of: a number, or a set of numbers.
        self._stored_labels = self.labels
        if label_file:
            names = [path for path, _ in found]
            self._stored_labels = read_label_sets(label_file, names, num_classes=self.num_classes)
            self.label_sets = zlib.crc32(self._stored_labels.tobytes())
            self.element_spec["label"] = tf.TensorSpec((self.num_classes,), tf.float32)
        if check_files:
            _check_headers(self.paths.tolist())

    def _files_of_split_directory(self) -> dict[str, list[str]]:
        splits = [path.name for path in _directories(self.data_dir)]
        if self.split not in splits:
            raise ConfigError(
                f"{self.data_dir} has no split {self.split!r}; it has {splits}: set "
                'config.data.train_split, val_split and test_split ("" for none) to these'
            )
        self._root = self.data_dir / self.split
        own = _class_directories(self._root)
        reference = self.data_dir / self._train_split
        # A split to be evaluated may lie alone, without train: then its own directories are the
        # classes, and their names are compared with the checkpoint's later.
        self._folders = _class_directories(reference) if self._train_split in splits else own
        unknown = sorted(set(own) - set(self._folders))
        if unknown:
            raise DataError(
                f"{self._root} has classes which {reference} lacks: {unknown[:5]}; their labels "
                f"would be unknown: add them to {self._train_split} or remove them here"
                + look_alike(map(printable, unknown), map(printable, self._folders))
            )
        return _list_images(self._root, own)

    def _files_by_fraction(self, val: float, test: float) -> dict[str, list[str]]:
        if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
            raise ConfigError(
                f"val_fraction={val} and test_fraction={test}: each must be in [0, 1), and so must "
                "their sum"
            )
        if self.split not in SPLITS:
            raise ConfigError(
                f"source 'folder' has no split {self.split!r}; it has {list(SPLITS)}, as there is "
                f"no directory {self.data_dir / self.split} of classes"
            )
        self._root = self.data_dir
        self._folders = _class_directories(self.data_dir)
        files = _list_images(self.data_dir, self._folders)
        return {name: _part(name, files[name], self.split, val, test) for name in files}

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        if self._tables is None:
            # Names need not be UTF-8, which TensorFlow refuses as text: fsencode gives their bytes.
            names = [os.fsencode(path) for path in self.paths.tolist()]
            self._tables = base.on_host(
                lambda: {"path": tf.constant(names), "label": tf.constant(self._stored_labels)}
            )
        return {key: tf.gather(table, indices) for key, table in self._tables.items()}

    def decode_record(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        example = {**record, "image": tf.io.read_file(record["path"])}
        if self.label_sets is not None:
            example["label"] = as_row(record["label"], self.num_classes)
        return example

    def load(self, index: int) -> tuple[bytes, int]:
        return epath.Path(self.paths[index]).read_bytes(), int(self.labels[index])

    def names(self) -> list[str]:
        return [path.removeprefix(f"{self._root}/") for path in self.paths.tolist()]

    def sizes(self) -> int | None:
        if paths.is_remote(self.data_dir):
            return None  # it would take one request for each file
        names = self.paths.tolist()
        # 1000 files a task: handing a task to a thread takes longer than asking for one size.
        parts = [names[i : i + 1000] for i in range(0, len(names), 1000)]
        with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
            return checksum(" ".join(sizes) for sizes in pool.map(_sizes, parts))

    def locations(self) -> list[str]:
        return self.paths.tolist()

    def describe(self, index: int) -> str:
        return f"image file {str(self.paths[index])!r} (example {index} of {self})"


def _sizes(names: Sequence[str]) -> list[str]:
    """Returns the bytes of files, "-" for one that is not there."""

    def size(name: str) -> str:
        try:
            return str(os.stat(name).st_size)
        except FileNotFoundError:
            return "-"

    return [size(name) for name in names]


def _directories(path: epath.Path) -> list[epath.Path]:
    found = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    return sorted(entry for entry in found if entry.is_dir())


def _is_split(path: epath.Path) -> bool:
    """Whether a directory holds classes. One that is called "train" may also be a class itself."""
    if not path.is_dir():
        return False
    entries = (entry for entry in path.iterdir() if not entry.name.startswith("."))
    # Names of images are passed over without is_dir(), which in a bucket is a request each.
    return any(not is_image(entry.name) and entry.is_dir() for entry in entries)


def _class_directories(root: epath.Path) -> tuple[str, ...]:
    names = tuple(path.name for path in _directories(root))
    if not names:
        raise DataError(
            f"{root} has no class directories; it should hold one directory of images per class"
        )
    return names


def _list_images(root: epath.Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns class -> sorted names of its image files."""
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        # In parallel, as listing a class waits for a network file system or a bucket.
        listed = pool.map(lambda name: sorted(p.name for p in (root / name).iterdir()), names)
    # A class without images is an error; other files beside images are only named in the log.
    files, ignored = {}, []
    for name, entries in zip(names, listed, strict=True):
        entries = [entry for entry in entries if not entry.startswith(".")]
        files[name] = [entry for entry in entries if is_image(entry)]
        others = [entry for entry in entries if not is_image(entry)]
        ignored += [f"{name}/{entry}" for entry in others]
        if not files[name]:
            raise DataError(
                f"class directory {root / name} holds no image"
                + (f" ({count_kinds(others)}, e.g. {others[0]!r})" if others else "")
                + f"; supported are {', '.join(EXTENSIONS)}: convert the files, or remove it"
            )
    if ignored:
        logging.warning(
            "%s: ignored %d files that TensorFlow does not decode: %s (e.g. %r). Convert them to "
            "JPEG or PNG to train on them",
            root,
            len(ignored),
            count_kinds(ignored),
            ignored[0],
        )
    return files


def _part(name: str, files: list[str], split: str, val: float, test: float) -> list[str]:
    """Returns the files (sorted) of class `name` that belong to `split`."""

    def rank(file: str) -> bytes:
        return hashlib.sha1(f"{name}/{file}".encode(errors="surrogateescape")).digest()

    # Sorted by a hash, so that neighbours (a burst of one scene) are spread over the splits, and a
    # new image moves few others to another split.
    ranked = sorted(files, key=rank)
    # "train" gets what is left, so that no image is lost by rounding.
    num_val, num_test = round(val * len(files)), round(test * len(files))
    part = {
        "val": ranked[:num_val],
        "test": ranked[num_val : num_val + num_test],
        "train": ranked[num_val + num_test :],
    }
    # Back in the order of names, in which a split's examples are numbered.
    return sorted(part[split])


def _check_headers(names: list[str]) -> None:
    """Raises DataError for files that are empty or no images by their first bytes: names all."""
    total = len(names)
    if total > MAX_HEADERS:
        logging.info("checking the headers of %d of %d images", MAX_HEADERS, total)
        # The seed is fixed, so that every start looks at the same files and says the same of them.
        names = random.Random(0).sample(names, MAX_HEADERS)
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        problems = zip(names, pool.map(_header_problem, names), strict=True)
        found = [f"image file {name!r} {problem}" for name, problem in problems if problem]
    if not found:
        return
    # One file fits the line of the error; several get a list.
    if len(found) == 1:
        raise DataError(f"{found[0]}; replace it or remove it")
    shown = "".join(f"\n  {line}" for line in found[:MAX_NAMED])
    more = f"\n  and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    raise DataError(
        f"{len(found)} of {len(names)} files looked at are no images; replace them or remove them, "
        f"or set config.input.on_bad_example=mask:{shown}{more}"
    )


def _header_problem(name: str) -> str | None:
    try:
        with epath.Path(name).open("rb") as file:
            header = file.read(HEADER_BYTES)
    # What the storage cannot give now says nothing of the image: an error of its own.
    except FileNotFoundError as error:
        return f"cannot be read ({error.strerror or error})"
    return header_problem(header)
