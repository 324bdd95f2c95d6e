"""Writes a contact sheet of what the model will see: each image after each op of the pipe.

python -m vit_dist.show --config FILE --output sheet.png [--split train] [--step 0] [--count 8]

Each row is an example: of the training split those of a step's batch, of another split the first
ones. The columns are the image as stored, then after each op; with config.mixing the last column is
the image mixed with its partner in the batch, and the caption says in which shares.
"""

import io

from vit_dist.config.errors import ConfigError
from vit_dist.run import cli  # before TensorFlow, whose start-up notices it turns down

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags
from etils import epath
from PIL import Image

from vit_dist.data.mixing import Mixing
from vit_dist.data.pipeline import train_records
from vit_dist.data.view import stages, viewable
from vit_dist.inspection.lettering import undrawable
from vit_dist.inspection.sheet import Cell, describe_label, draw_sheet
from vit_dist.run.check import check
from vit_dist.run.options import Data, RunOptions
from vit_dist.storage.errors import check_bucket

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's own flags; not at import, where other commands' have the same names."""
    cli.define_config()
    flags.DEFINE_string("output", None, "image file to write, e.g. sheet.png")
    flags.DEFINE_string("split", "train", "train, val or test")
    flags.DEFINE_integer("step", 0, "of the training split: which batch")
    flags.DEFINE_integer("count", 8, "how many examples, from the first of the batch on")


def main() -> int:
    """The command; returns its exit code."""
    options, data = check(cli.load_config())
    if not FLAGS.output:
        raise ConfigError("give an image file to write: --output sheet.png")
    check_bucket(FLAGS.output, "--output")
    sheet = contact_sheet(options, data, split=FLAGS.split, step=FLAGS.step, count=FLAGS.count)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    epath.Path(FLAGS.output).write_bytes(buffer.getvalue())
    print(f"{FLAGS.output}: {sheet.width} x {sheet.height} pixels")
    lacking = undrawable(data.sources[FLAGS.split].class_names)
    if lacking:
        print(
            f"warning: no font of this machine has {len(lacking)} of the characters in names of "
            f"classes; codes such as U+{ord(lacking[0]):04X} stand for them. To see the letters, "
            "install a font of that script, such as one of Noto's"
        )
    return 0


def contact_sheet(
    options: RunOptions, data: Data, *, split: str = "train", step: int = 0, count: int = 8
) -> Image.Image:
    """Draws what `make_rows` returns; its arguments and errors."""
    titles, rows = make_rows(options, data, split=split, step=step, count=count)
    return draw_sheet(rows, titles=titles)


def make_rows(
    options: RunOptions, data: Data, *, split: str = "train", step: int = 0, count: int = 8
) -> tuple[list[str], list[list[Cell]]]:
    """Makes a sheet's content, in this process and one example at a time.

    Args:
      options, data: see run.check.check.
      split: which one, of those configured.
      step: of the training split, whose batch of this step is shown.
      count: rows; at most as many as a batch, or the split, has examples.

    Returns:
      The titles of the columns, and a row for each example: its image as stored, with its class,
      and after each op.

    Raises:
      ConfigError: no such split, or one that can only be streamed; a number out of range.
    """
    if split not in data.sources:
        raise ConfigError(f"split {split!r} is not configured; there are {sorted(data.sources)}")
    if not data.sources[split].indexable:
        raise ConfigError(
            f"{data.sources[split]} can only be streamed: it has no examples by number"
        )
    if count < 1 or step < 0:
        raise ConfigError(f"--count must be 1 or more and --step 0 or more, got {count} and {step}")
    training, mixing = split == "train", options.input.mixing
    group = mixing.group_size if training and mixing else 1  # whole ones: partners are within
    most = options.input.batch_size if training else data.sources[split].num_examples
    examples = _examples(options, data, split, step, min(-(-count // group) * group, most))
    pipe = options.input.pipe if training else options.evaluation.pipe
    titles = ["stored", *(s.text for s in pipe.steps if s.op.image or s.op.on_device)]
    rows = [stages(pipe, example) for example in examples]
    labels = np.array([int(example["label"]) for example in examples])
    names = data.sources[split].class_names
    if training and mixing:
        titles.append("mixing")
        classes = tf.one_hot(labels, len(names))
        mixed, labels = _mixtures(options, mixing, step, rows, classes)
        rows = [[*row, image] for row, image in zip(rows, mixed, strict=True)]
    captions = [describe_label(label, names) for label in labels]
    cells = [
        [Cell(row[0], caption), *map(Cell, row[1:])]
        for row, caption in zip(rows, captions, strict=True)
    ]
    return titles, cells[:count]


def _examples(
    options: RunOptions, data: Data, split: str, step: int, count: int
) -> list[dict[str, tf.Tensor]]:
    source = data.sources[split]
    source.prepare()
    if split == "train":
        first = step * options.input.batch_size
        positions = tf.range(first, first + count, dtype=tf.int64)
        known = {"batch_size": options.input.batch_size, "repeats": options.input.repeats}
        where = train_records(source, positions, seed=options.seed, **known)
    else:
        index = tf.range(count, dtype=tf.int64)
        epoch = tf.zeros_like(index)
        seeds = tf.cast(tf.stack([epoch, index], axis=1), tf.int32)
        where = {"index": index, "epoch": epoch, "seed": seeds}
    each = [{key: value[i] for key, value in where.items()} for i in range(count)]
    return [{**source.read(place["index"]), **place} for place in each]


def _mixtures(
    options: RunOptions, mixing: Mixing, step: int, rows: list[list[np.ndarray]], classes: tf.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """The images of whole groups of a batch, mixed, as uint8 (B, H, W, 3); their labels (B, C)."""
    # Mixing works on the floats that the op on the device makes, and the rows hold the pixels that
    # stand for them. So that op is done again, on the column before its own.
    images = tf.constant(np.stack([row[-2] for row in rows]))
    height, width = images.shape[1:3]
    params = mixing.draw(
        tf.constant(step),
        seed=options.seed,
        batch_size=options.input.batch_size,
        size=(height, width),
    )[: len(rows)]
    floats = mixing.images(options.input.pipe.device(images), params)
    return viewable(options.input.pipe, floats), mixing.labels(classes, params).numpy()


def script() -> None:
    """The program vit-dist-show: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
