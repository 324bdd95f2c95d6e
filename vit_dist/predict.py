"""What a trained ViT sees in images.

python -m vit_dist.predict --checkpoint runs/NAME --images 'photos/*.jpg' [--top 3]

--checkpoint takes what config.init_from takes. A run has recorded how images are prepared and what
its classes are called; weights of another system need a config.json beside them that tells it.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.damage import message_of
from vit_dist.export import Served, hint_without_flags, open_served
from vit_dist.run.image_files import expand_images, shown

# Images that are classified at once; their files are in memory together.
_BATCH = 32


class Prediction(NamedTuple):
    """The most likely classes of an image, best first; or `problem`, why it could not be read."""

    path: str
    classes: list[str]
    probabilities: list[float]
    problem: str = ""


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_string("checkpoint", None, "a run's folder, or weights of any system")
    flags.DEFINE_multi_string(
        "images", [], "files, patterns such as 'photos/*.jpg', or folders; may be given repeatedly"
    )
    flags.DEFINE_integer("top", 1, "how many classes to name", lower_bound=1)


def main() -> int:
    """The command; returns its exit code: 1 if an image could not be read."""
    given = flags.FLAGS
    if not given.checkpoint or not given.images:
        raise ConfigError("give a model and images: --checkpoint runs/NAME --images 'photos/*.jpg'")
    bad = 0
    for found in predict(given.checkpoint, given.images, top=given.top):
        if found.problem:
            bad += 1
            print(f"left out: {found.problem}", file=sys.stderr, flush=True)
            continue
        pairs = zip(found.classes, found.probabilities, strict=True)
        print(shown(found.path), *(f"{name} {p:.1%}" for name, p in pairs), sep="\t", flush=True)
    if bad:
        print(f"error: {bad} images could not be read, see above", file=sys.stderr)
    return cli.FAILURE if bad else 0


def predict(checkpoint: str, images: Sequence[str], *, top: int = 1) -> Iterator[Prediction]:
    """Classifies image files; the Prediction of a file that cannot be read says why.

    Args:
      checkpoint: see origins.open_origin.
      images: files, patterns or folders, local or gs://.
      top: how many classes to name for each.

    Yields:
      One Prediction an image, in the order given (patterns and folders sorted).

    Raises:
      DataError: no such images.
      ConfigError: a checkpoint without a head.
    """
    paths = expand_images(images)
    served, names = open_served(checkpoint, hint=hint_without_flags(checkpoint))
    for start in range(0, len(paths), _BATCH):
        yield from _predict_batch(served, names, paths[start : start + _BATCH], top)


def _predict_batch(
    served: Served, names: Sequence[str], paths: Sequence[str], top: int
) -> Iterator[Prediction]:
    data = {path: tf.io.read_file(path) for path in paths}
    problems: dict[str, str] = {}
    # All at once, which is fast; only if that fails one by one.
    try:
        rows = served.serve(tf.stack(list(data.values())))["probabilities"].numpy()
    except tf.errors.InvalidArgumentError:
        # TensorFlow does not say which image failed, so each is prepared alone.
        problems = {path: _problem(served, path, one) for path, one in data.items()}
        problems = {path: text for path, text in problems.items() if text}
        good = [one for path, one in data.items() if path not in problems]
        rows = served.serve(tf.stack(good))["probabilities"].numpy() if good else ()
    # `rows` has the readable images only, in the order of `paths`.
    each = iter(rows)
    for path in paths:
        if path in problems:
            yield Prediction(path, [], [], problems[path])
            continue
        row = next(each)
        # Stable: of equal probabilities the class with the smaller number comes first.
        best = np.argsort(-row, kind="stable")[:top]
        yield Prediction(path, [names[i] for i in best], [float(row[i]) for i in best])


def _problem(served: Served, path: str, data: tf.Tensor) -> str:
    """Why an image cannot be classified; "" if it can."""
    try:
        served.prepare(data)
    except (tf.errors.InvalidArgumentError, DataError) as error:
        return f"image file {shown(path)!r} cannot be read ({message_of(error)})"
    return ""


def script() -> None:
    """The program vit-dist-predict: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
