"""Writes a contact sheet of what the model will see: each image after each op of the pipe.

python -m vit_dist.show --config FILE --output sheet.png [--split train] [--step 0] [--count 8]

Each row is an example: of the training split the examples of a step's batch, of another split the
first examples. The columns are the image as stored, then after each op. With config.mixing the last
column is the image mixed with its partner in the batch, and the caption tells the shares of both. A
damaged image is black and called unreadable, and the log names it.
"""

import io

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags, logging
from PIL import Image

from vit_dist.data.damage import DATA_ERRORS, message_of
from vit_dist.data.mixing import Mixing
from vit_dist.data.ops.pipe import Pipe
from vit_dist.data.pipeline import train_records
from vit_dist.data.sources.cache import CachedSource
from vit_dist.data.sources.source import Source
from vit_dist.data.view import stages, viewable
from vit_dist.inspection.lettering import undrawable
from vit_dist.inspection.sheet import Cell, describe_label, draw_sheet
from vit_dist.run.check import check
from vit_dist.run.options import Data, RunOptions
from vit_dist.storage.errors import check_bucket
from vit_dist.storage.files import write_output

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines this command's flags; not at import: other commands have flags of the same names."""
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
    write_output(FLAGS.output, buffer.getvalue())
    print(f"{FLAGS.output}: {sheet.width} x {sheet.height} pixels")
    prepared = data.sources[FLAGS.split].prepared
    if prepared is not None:
        print(f"{FLAGS.split} was resized beforehand: {prepared}")
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
    """Draws what `make_rows` returns. Arguments and errors as in make_rows."""
    titles, rows = make_rows(options, data, split=split, step=step, count=count)
    return draw_sheet(rows, titles=titles)


def make_rows(
    options: RunOptions, data: Data, *, split: str = "train", step: int = 0, count: int = 8
) -> tuple[list[str], list[list[Cell]]]:
    """Makes a sheet's content, in this process and one example at a time.

    Args:
      options, data: see run.check.check.
      split: one of the configured splits.
      step: for the training split, the step whose batch is shown.
      count: number of rows; at most as many as a batch, or the split, has examples.

    Returns:
      The titles of the columns, and a row for each example: its image as stored, with its class,
      and after each op.

    Raises:
      ConfigError: no such split, or one that can only be streamed; a number out of range.
      DataError: all of the examples are damaged. If some are, their cells say so, and the log names
        them.
    """
    if split not in data.splits:
        raise ConfigError(f"split {split!r} is not configured; there are {sorted(data.splits)}")
    if not data.sources[split].indexable:
        raise ConfigError(
            f"{data.sources[split]} can only be streamed: it has no examples by number"
        )
    if count < 1 or step < 0:
        raise ConfigError(f"--count must be 1 or more and --step 0 or more, got {count} and {step}")
    training, mixing = split == "train", options.input.mixing
    # Images are mixed within groups of neighbours, so whole groups are made; -(-a // b) rounds up.
    # What is more than `count` is cut off below.
    group = mixing.group_size if training and mixing else 1
    most = options.input.batch_size if training else data.sources[split].num_examples
    source = data.sources[split]
    places = _places(options, source, split, step, min(-(-count // group) * group, most))
    pipe = options.input.pipe if training else options.evaluation.pipe
    # Only ops that change the image have a column.
    titles = ["stored", *(s.text for s in pipe.steps if s.op.image or s.op.on_device)]
    found = [_make_row(pipe, source, place) for place in places]
    readable = [row for row in found if row is not None]
    if not readable:
        raise DataError(
            f"none of these {len(found)} examples of {source} can be read: replace them or remove "
            "them (the log says which they are)"
        )
    # What cannot be read is black, and of the class -1, of which tf.one_hot makes shares of 0.
    blank = [np.zeros_like(image) for image in readable[0][0]], -1
    rows = [(row or blank)[0] for row in found]
    labels = np.array([(row or blank)[1] for row in found])
    names = data.sources[split].class_names
    if training and mixing:
        titles.append("mixing")
        classes = tf.one_hot(labels, len(names))
        mixed, labels = _mixtures(options, mixing, step, rows, classes)
        rows = [[*row, image] for row, image in zip(rows, mixed, strict=True)]
    captions = [
        describe_label(label, names) if row else "unreadable"
        for label, row in zip(labels, found, strict=True)
    ]
    cells = [
        [Cell(row[0], caption), *map(Cell, row[1:])]
        for row, caption in zip(rows, captions, strict=True)
    ]
    return titles, cells[:count]


def _places(
    options: RunOptions, source: Source, split: str, step: int, count: int
) -> list[dict[str, tf.Tensor]]:
    """The indices, epochs and seeds that the pipeline gives `count` examples."""
    source.prepare()
    # Positions and seeds as in training, so that the sheet shows what the step sees (law 1).
    if split == "train":
        first = step * options.input.batch_size
        positions = tf.range(first, first + count, dtype=tf.int64)
        known = {"batch_size": options.input.batch_size, "repeats": options.input.repeats}
        where = train_records(source, positions, seed=options.seed, **known)
    else:
        # As in an evaluation: epoch 0, in order, with the seed (epoch, index).
        index = tf.range(count, dtype=tf.int64)
        epoch = tf.zeros_like(index)
        seeds = tf.cast(tf.stack([epoch, index], axis=1), tf.int32)
        where = {"index": index, "epoch": epoch, "seed": seeds}
    return [{key: value[i] for key, value in where.items()} for i in range(count)]


def _make_row(
    pipe: Pipe, source: Source, place: dict[str, tf.Tensor]
) -> tuple[list[np.ndarray], int] | None:
    """An example's images, see view.stages, and its label; None if it is damaged: the log says how.

    Of a photo that is cut, or a record whose bits flipped, the others can still be looked at.
    """
    index = int(place["index"])
    try:
        # A cache of decoded images holds them upright already; behind it they are as stored.
        stored = source.peek(index)[0] if isinstance(source, CachedSource) else None
        example = {**source.read(place["index"]), **place}
        return stages(pipe, example, stored=stored), int(example["label"])
    except (FileNotFoundError, *DATA_ERRORS) as error:
        logging.warning("%s cannot be read: %s", source.describe(index), message_of(error))
        return None


def _mixtures(
    options: RunOptions, mixing: Mixing, step: int, rows: list[list[np.ndarray]], classes: tf.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """The images of whole groups of a batch, mixed, as uint8 (B, H, W, 3); their labels (B, C)."""
    # Mixing works on the floats that the op on the device makes, but the last column of `rows` has
    # these as pixels, for viewing. So the op on the device is applied again, to the column before.
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
