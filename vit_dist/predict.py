"""What a trained ViT sees in images.

python -m vit_dist.predict --checkpoint runs/NAME --images 'photos/*.jpg' [--top 3]

--checkpoint takes what config.init_from takes. A run knows how to prepare images and what its
classes are called; other files must tell by a config.json beside them.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vit_dist.run import cli  # before TensorFlow, whose start-up notices it turns down

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags

from vit_dist.data.sources.folder import EXTENSIONS
from vit_dist.export import hint_without_flags, open_served

_BATCH = 32


class Prediction(NamedTuple):
    """The most likely classes of an image, best first."""

    path: str
    classes: list[str]
    probabilities: list[float]


def define_flags() -> None:
    """Defines the command's flags; not at import, where another command's would clash."""
    flags.DEFINE_string("checkpoint", None, "a run's folder, or weights of any system")
    flags.DEFINE_list("images", None, "files, patterns such as 'photos/*.jpg', or folders")
    flags.DEFINE_integer("top", 1, "how many classes to name", lower_bound=1)


def main() -> int:
    """The command; returns its exit code."""
    given = flags.FLAGS
    if not given.checkpoint or not given.images:
        raise ValueError("give a model and images: --checkpoint runs/NAME --images 'photos/*.jpg'")
    for found in predict(given.checkpoint, given.images, top=given.top):
        pairs = zip(found.classes, found.probabilities, strict=True)
        print(found.path, *(f"{name} {p:.1%}" for name, p in pairs), sep="\t", flush=True)
    return 0


def predict(checkpoint: str, images: Sequence[str], *, top: int = 1) -> Iterator[Prediction]:
    """Classifies image files.

    Args:
      checkpoint: see origins.open_origin.
      images: files, patterns or folders, local or gs://.
      top: how many classes to name for each.

    Yields:
      One Prediction an image, in the order given (patterns and folders sorted).

    Raises:
      ValueError: no such images, one that cannot be read, or a checkpoint without a head.
    """
    paths = _expand(images)
    served, names = open_served(checkpoint, hint=hint_without_flags(checkpoint))
    for start in range(0, len(paths), _BATCH):
        chunk = paths[start : start + _BATCH]
        data = [tf.io.read_file(path) for path in chunk]
        try:
            probabilities = served.serve(tf.stack(data))["probabilities"].numpy()
        except tf.errors.InvalidArgumentError as error:
            raise _explained(served, chunk, data, error) from error
        for path, row in zip(chunk, probabilities, strict=True):
            best = np.argsort(-row, kind="stable")[:top]
            yield Prediction(path, [names[i] for i in best], [float(row[i]) for i in best])


def _expand(images: Sequence[str]) -> list[str]:
    paths: list[str] = []
    for text in images:
        if tf.io.gfile.isdir(text):
            names = sorted(tf.io.gfile.listdir(text))
            found = [f"{text}/{n}" for n in names if n.lower().endswith(tuple(EXTENSIONS))]
        else:
            found = sorted(tf.io.gfile.glob(text))
        if not found:
            raise ValueError(f"there are no images at {text!r}")
        paths += found
    return paths


def _explained(served, paths: Sequence[str], data: Sequence[tf.Tensor], error) -> Exception:
    """Names the image that cannot be decoded."""
    for path, one in zip(paths, data, strict=True):
        try:
            served.prepare(one)
        except tf.errors.InvalidArgumentError:
            return ValueError(f"image file {path!r} cannot be read; replace it or leave it out")
    return error


def script() -> None:
    """The program vit-dist-predict: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
