"""Converts a config's data to shards whose examples can be read by index, resized if asked to.

python -m vit_dist.convert --config FILE --output FOLDER [--splits train,val]
    [--short_side=256 [--quality=90 | --format=raw]]

After it was stopped or killed, the same command goes on. Then train on the shards with
--config.data.source=array_record --config.data.data_dir=FOLDER and the splits train, val and test;
with --config.data.source=raw on what --format=raw wrote.

--short_side=N reduces each image's shorter side to N pixels, upright and over white, and writes
JPEGs or, with --format=raw, pixels that need no decoding: docs/data_resized.md.
"""

import functools

from vit_dist.config.errors import ConfigError
from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
from absl import flags

from vit_dist.data.resized import changes_of, convert_resized
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.preparation import FORMATS, QUALITY, make_preparation
from vit_dist.monitoring.progress import Progress
from vit_dist.run.sources import SPLITS, open_sources

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines this command's flags; not at import: other commands have flags of the same names."""
    cli.define_config()
    flags.DEFINE_string("output", None, "local folder for the shards, one directory a split")
    flags.DEFINE_list("splits", None, "of train, val, test; all that are configured")
    flags.DEFINE_integer("examples_per_shard", 8192, "0.9 GB of ImageNet's JPEGs")
    flags.DEFINE_integer("short_side", None, "pixels to which each image's shorter side is reduced")
    flags.DEFINE_integer("quality", None, f"with short_side: of the JPEGs, 1..100; {QUALITY}")
    flags.DEFINE_string("format", None, f"with short_side: {' or '.join(FORMATS)}; jpeg")


def main() -> int:
    """The command; returns its exit code."""
    config = cli.load_config()
    if not FLAGS.output:
        raise ConfigError("give a folder for the shards: --output data/shards")
    preparation = make_preparation(FLAGS.short_side, quality=FLAGS.quality, format=FLAGS.format)
    write = convert
    if preparation is not None:
        write = functools.partial(convert_resized, preparation=preparation)
    splits = FLAGS.splits or [s for s in SPLITS if config.data[f"{s}_split"]]
    # training=False: without a cache or a service around the training split.
    for name, source in open_sources(config, training=False, splits=splits).items():
        with Progress(source.num_examples, title=f"convert {name}") as progress:
            written = write(
                source,
                FLAGS.output,
                split=name,
                examples_per_shard=FLAGS.examples_per_shard,
                report=functools.partial(progress.update, metrics={}),
            )
        print(f"{name}: {source.num_examples:,} examples, {written} shards written, all verified")
        if preparation is not None:
            print(f"{name}: {changes_of(FLAGS.output, name)}")
    if preparation is not None:
        kind = "raw" if preparation.format == "raw" else "array_record"
        print(f"train with --config.data.source={kind} --config.data.data_dir={FLAGS.output}")
    return 0


def script() -> None:
    """The program vit-dist-convert: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
