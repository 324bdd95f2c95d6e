"""Converts a config's data to ArrayRecord shards, whose examples can be read by index.

python -m vit_dist.convert --config FILE --output FOLDER [--splits train,val]

After it was stopped or killed, the same command goes on. Then train on the shards with
--config.data.source=array_record --config.data.data_dir=FOLDER and the splits train, val and test.
"""

import functools

from vit_dist.config.errors import ConfigError
from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
from absl import flags

from vit_dist.data.sources.array_record import convert
from vit_dist.monitoring.progress import Progress
from vit_dist.run.sources import SPLITS, open_sources

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines this command's flags; not at import: other commands have flags of the same names."""
    cli.define_config()
    flags.DEFINE_string("output", None, "local folder for the shards, one directory a split")
    flags.DEFINE_list("splits", None, "of train, val, test; all that are configured")
    flags.DEFINE_integer("examples_per_shard", 8192, "0.9 GB of ImageNet's JPEGs")


def main() -> int:
    """The command; returns its exit code."""
    config = cli.load_config()
    if not FLAGS.output:
        raise ConfigError("give a folder for the shards: --output data/shards")
    splits = FLAGS.splits or [s for s in SPLITS if config.data[f"{s}_split"]]
    # training=False: without a cache or a service around the training split.
    for name, source in open_sources(config, training=False, splits=splits).items():
        with Progress(source.num_examples, title=f"convert {name}") as progress:
            written = convert(
                source,
                FLAGS.output,
                split=name,
                examples_per_shard=FLAGS.examples_per_shard,
                report=functools.partial(progress.update, metrics={}),
            )
        print(f"{name}: {source.num_examples:,} examples, {written} shards written, all verified")
    return 0


def script() -> None:
    """The program vit-dist-convert: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
