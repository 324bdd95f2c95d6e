"""Writes a contact sheet of what the model will see: each image after each op of the pipe.

python -m vit_dist.show --config FILE --output sheet.png [--split train] [--step 0] [--count 8]

A row is an example: of the training split those of a step's batch, else the first ones. Columns are
the image as stored, then after each op; with config.mixing the last is the mixture of the batch.
"""

import io

from vit_dist.run import cli  # before TensorFlow, whose start-up notices it turns down

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags
from etils import epath
from PIL import Image, ImageDraw

from vit_dist.data.pipeline import places
from vit_dist.data.view import stages, viewable
from vit_dist.paths import check_bucket
from vit_dist.run.check import check
from vit_dist.run.options import Data, RunOptions

FLAGS = flags.FLAGS
LABEL_HEIGHT, GAP = 14, 6  # pixels
SMALLEST, LARGEST = 64, 224  # pixels of an image's longer side; others are shown larger or smaller


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
        raise ValueError("give an image file to write: --output sheet.png")
    check_bucket(FLAGS.output, "--output")
    sheet = contact_sheet(options, data, split=FLAGS.split, step=FLAGS.step, count=FLAGS.count)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    epath.Path(FLAGS.output).write_bytes(buffer.getvalue())
    print(f"{FLAGS.output}: {sheet.width} x {sheet.height} pixels")
    return 0


def contact_sheet(
    options: RunOptions, data: Data, *, split: str = "train", step: int = 0, count: int = 8
) -> Image.Image:
    """Returns the sheet.

    Args:
      options, data: See run.check.check.
      split: Which, of those configured.
      step: Of the training split.
      count: Rows; at most a batch, or the split.

    Raises:
      ValueError: No such split, or one that can only be streamed; a number out of range.
    """
    if split not in data.sources:
        raise ValueError(f"split {split!r} is not configured; there are {sorted(data.sources)}")
    if not data.sources[split].indexable:
        raise ValueError(
            f"{data.sources[split]} can only be streamed: it has no examples by number"
        )
    if count < 1 or step < 0:
        raise ValueError(f"--count must be 1 or more and --step 0 or more, got {count} and {step}")
    training, mixing = split == "train", options.input.mixing
    group = mixing.group_size if training and mixing else 1  # whole ones: partners are within
    most = options.input.batch_size if training else data.sources[split].num_examples
    examples = _examples(options, data, split, step, min(-(-count // group) * group, most))
    pipe = options.input.pipe if training else options.evaluation.pipe
    rows = [stages(pipe, example) for example in examples]
    names = data.sources[split].class_names
    captions = [names[int(example["label"])] for example in examples]
    titles = ["stored", *(s.text for s in pipe.steps if s.op.image or s.op.on_device)]
    if training and mixing:
        titles.append("mixing")
        _add_mixtures(options, step, rows, captions)
    return _draw(titles, rows[:count], captions[:count])


def _examples(
    options: RunOptions, data: Data, split: str, step: int, count: int
) -> list[dict[str, tf.Tensor]]:
    source = data.sources[split]
    source.prepare()
    if split == "train":
        first = step * options.input.batch_size
        positions = tf.range(first, first + count, dtype=tf.int64)
        known = {"batch_size": options.input.batch_size, "repeats": options.input.repeats}
        where = places(source, positions, seed=options.seed, **known)
    else:
        index = tf.range(count, dtype=tf.int64)
        epoch = tf.zeros_like(index)
        seeds = tf.cast(tf.stack([epoch, index], axis=1), tf.int32)
        where = {"index": index, "epoch": epoch, "seed": seeds}
    each = [{key: value[i] for key, value in where.items()} for i in range(count)]
    return [{**source.read(place["index"]), **place} for place in each]


def _add_mixtures(
    options: RunOptions, step: int, rows: list[list[np.ndarray]], captions: list[str]
) -> None:
    pipe, mixing, count = options.input.pipe, options.input.mixing, len(rows)
    assert mixing is not None
    # The device's op comes after all others on images: before it is what the batch holds.
    images = tf.constant(np.stack([row[-2] for row in rows]))
    height, width = images.shape[1:3]
    params = mixing.draw(
        tf.constant(step),
        seed=options.seed,
        batch_size=options.input.batch_size,
        size=(height, width),
    )[:count]
    for row, image in zip(
        rows, viewable(pipe, mixing.images(pipe.device(images), params)), strict=True
    ):
        row.append(image)
    shares, group = params.numpy()[:, 0], mixing.group_size
    own = list(captions)
    for i, share in enumerate(shares):
        partner = i // group * group + (i - 1) % group
        captions[i] = f"{own[i]}; {share:.2f} + {1 - share:.2f} {own[partner]}"


def _draw(titles: list[str], rows: list[list[np.ndarray]], captions: list[str]) -> Image.Image:
    images = [[_thumbnail(image) for image in row] for row in rows]
    widths = [max(row[i].width for row in images) for i in range(len(titles))]
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lengths = [probe.textlength(title) for title in titles]
    lengths[0] = max(lengths[0], *(probe.textlength(caption) for caption in captions))
    widths = [max(w, int(length) + 1) + GAP for w, length in zip(widths, lengths, strict=True)]
    heights = [max(image.height for image in row) + LABEL_HEIGHT + GAP for row in images]
    sheet = Image.new("RGB", (sum(widths) + GAP, sum(heights) + LABEL_HEIGHT + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [GAP + sum(widths[:i]) for i in range(len(widths))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, 0), title, fill="black")
    top = LABEL_HEIGHT + GAP
    for row, caption, height in zip(images, captions, heights, strict=True):
        draw.text((lefts[0], top), caption, fill="black")
        for left, image in zip(lefts, row, strict=True):
            sheet.paste(image, (left, top + LABEL_HEIGHT))
        top += height
    return sheet


def _thumbnail(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST, LARGEST))
    factor = -(-SMALLEST // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def script() -> None:
    """The program vit-dist-show: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
