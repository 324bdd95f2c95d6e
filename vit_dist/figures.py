"""Draws what a trained ViT looks like inside.

python -m vit_dist.figures --checkpoint runs/NAME --images 'photos/*.jpg' --output figures

--checkpoint takes what config.init_from takes. Of the weights alone: filters (principal components
of the patch kernel) and positions (similarity of position embeddings). Of images: distances (mean
attention distance by head and block), attention (what the head looks at, by attention head),
rollout, norms (of tokens), similarity (CKA between blocks). docs/inspection.md has the formulas.
"""

import dataclasses
import sys
from collections.abc import Sequence

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags
from etils import epath

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.damage import message_of
from vit_dist.inspection.draw import (
    FORMATS,
    check_matplotlib,
    draw_images,
    draw_weights,
    encode,
)
from vit_dist.inspection.look import look_at_images, look_at_weights
from vit_dist.paths import expand
from vit_dist.run import image_files
from vit_dist.run.image_files import expand_images
from vit_dist.run.origins import open_origin
from vit_dist.run.served import Served, eval_pipe, hint_without_flags, load_model
from vit_dist.storage.errors import check_bucket
from vit_dist.storage.files import make_folder, write_whole


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What `figures` did.

    Attributes:
      files: the files written.
      images: the image files that were looked at.
      problems: of each image that could not be read, why.
    """

    files: list[epath.Path]
    images: list[str]
    problems: list[str]


def define_flags() -> None:
    """Defines this command's flags; not at import: other commands have flags of the same names."""
    flags.DEFINE_string("checkpoint", None, "a run's folder, or weights of any system")
    flags.DEFINE_multi_string(
        "images",
        [],
        "files, patterns such as 'photos/*.jpg', or folders; may be given repeatedly. Without "
        "images only the figures of the weights are drawn",
    )
    flags.DEFINE_integer(
        "count", 32, "look at so many of the images, from the first on", lower_bound=1
    )
    flags.DEFINE_string("output", None, "folder for the figures; made if absent")
    flags.DEFINE_enum("format", "png", FORMATS, "of the figures")


def main() -> int:
    """The command; returns its exit code: 1 if an image could not be read."""
    given = flags.FLAGS
    if not given.checkpoint or not given.output:
        raise ConfigError("give a model and a folder: --checkpoint runs/NAME --output figures")
    drawn = figures(
        given.checkpoint, given.output, images=given.images, count=given.count, format=given.format
    )
    for problem in drawn.problems:
        print(f"left out: {problem}", file=sys.stderr, flush=True)
    for path in drawn.files:
        print(path)
    if not given.images:
        print("the other figures need images: --images 'photos/*.jpg'")
    if drawn.problems:
        count = len(drawn.problems)
        print(f"error: {count} images could not be read, see above", file=sys.stderr)
    return cli.FAILURE if drawn.problems else 0


def figures(
    checkpoint: str,
    output: str,
    *,
    images: Sequence[str] = (),
    count: int = 32,
    format: str = "png",
) -> Drawn:
    """Draws the figures of a checkpoint into a folder, each as NAME.FORMAT.

    Args:
      checkpoint: see origins.open_origin.
      output: folder, local or gs://; made if absent.
      images: files, patterns or folders; without any, only the figures of the weights are drawn.
      count: look at so many of the images, from the first on.
      format: one of draw.FORMATS.

    Raises:
      ConfigError: matplotlib is not installed, an unknown format, or an output that is a file.
      DataError: no such checkpoint, one that does not tell how images are prepared, or no image
        that can be read.
      StorageError: the folder cannot be written.
    """
    check_matplotlib("python -m vit_dist.figures")
    folder = _check_output(output, format)
    paths = expand_images(images)
    if len(paths) > count:
        print(f"looking at the first {count} of {len(paths)} images; --count says how many")
    origin = open_origin(checkpoint, hint=hint_without_flags(checkpoint))
    model = load_model(origin)
    figures = list(draw_weights(look_at_weights(model)))
    problems: list[str] = []
    if paths:
        served = Served(model, eval_pipe(origin, model))
        pixels, problems = _read(served, paths[:count])
        look = look_at_images(model, pixels, served.pipe.device(tf.constant(pixels)))
        figures += draw_images(look)
    make_folder(folder)
    files = []
    for name, figure in figures:
        files.append(folder / f"{name}.{format}")
        write_whole(files[-1], encode(figure, format))
    return Drawn(files, paths[:count], problems)


def _check_output(output: str, format: str) -> epath.Path:
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown; allowed: {', '.join(FORMATS)}")
    check_bucket(output, "--output")
    folder = expand(output)
    # One file cannot hold seven figures, and a folder called figure.png would surprise.
    if folder.suffix[1:] in FORMATS or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            f"--output {output!r} is to be a folder: it gets a file for each figure. --format says "
            "in which form"
        )
    return folder


def _read(served: Served, paths: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The images as the model's pipe prepares them, uint8 (n, height, width, C); and problems."""
    pixels: list[np.ndarray] = []
    problems: list[str] = []
    for path in paths:
        data, problem = image_files.try_read(path)
        try:
            if data is not None:
                pixels.append(served.prepare(data).numpy())
        except (tf.errors.InvalidArgumentError, DataError) as error:
            problem = image_files.unreadable(path, message_of(error))
        problems += [problem] if problem else []
    if not pixels:
        raise DataError(f"none of the images can be read; {problems[0]}")
    return np.stack(pixels), problems


def script() -> None:
    """The program vit-dist-figures: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
