"""Evaluates a checkpoint, at any resolution.

python -m vit_dist.evaluate --checkpoint RUN [--splits val,test] [--config FILE]

Without --config the config that the run recorded is taken; keys of either can be changed by
--config.key=value. The config says how the model is built and how images are prepared. If its
resolution differs from the checkpoint's, positions are resampled as config.init_from does it.
"""

from collections.abc import Sequence

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import tensorflow as tf
from absl import flags, logging
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from vit_dist.cluster.meeting import meet
from vit_dist.cluster.strategy import choose_cluster, make_strategy
from vit_dist.config.errors import ConfigError
from vit_dist.run.build import Evaluation, make_model
from vit_dist.run.check import check_evaluation
from vit_dist.run.explain import explain_lost_host
from vit_dist.run.facts import evaluation_facts
from vit_dist.run.options import Data, EvaluationOptions
from vit_dist.run.origins import Origin, open_origin
from vit_dist.run.start import check_whole, fill
from vit_dist.run.tpu_hosts import check_reading, tpu_hosts


def define_flags() -> None:
    """Defines this command's flags."""
    cli.define_config(default_from="checkpoint")
    flags.DEFINE_string("checkpoint", None, "a run's folder, or one checkpoint's")
    flags.DEFINE_list("splits", None, "of train, val, test; all but train by default")


def main() -> int:
    """The command; returns its exit code."""
    checkpoint = flags.FLAGS.checkpoint
    if not checkpoint:
        raise ConfigError("give a trained run: --checkpoint runs/NAME")
    config = cli.load_config()
    results = evaluate(config, checkpoint, splits=flags.FLAGS.splits)
    table = Table(title=f"{checkpoint} at {config.image_size} px")
    columns = ("split", "accuracy", "top5_accuracy", "loss", "examples")
    for column in columns:
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, metrics in results.items():
        cells = [f"{metrics[c]:.4f}" if c in metrics else "-" for c in columns[1:4]]
        table.add_row(split, *cells, f"{metrics['examples']:.0f}")
    Console().print(table)
    return 0


def evaluate(
    config: ConfigDict, checkpoint: str, *, splits: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Evaluates the weights (the moving average where there is one) of a checkpoint.

    Args:
      config: the model, data and input sections count; no training split is needed.
      checkpoint: folder of a run or of one checkpoint.
      splits: which of "train", "val", "test"; None for val and test, those that are configured.

    Returns:
      split -> metrics, see evaluators.classification.make_evaluator.

    Raises:
      ConfigError: no such split or checkpoint, or a checkpoint that does not fit the config or has
        no head for the classes of the data.
      DataError: an example cannot be read.
    """
    options, data = check_evaluation(config, splits=splits)
    origin = open_origin(checkpoint, image_size=options.weights.image_size)
    devices = options.strategy
    cluster = choose_cluster(devices["name"], devices["tpu"])
    with tpu_hosts(devices, _note_request) as tpu_slice:
        # As in train: before a device starts, several hosts prove that they judge the same weights
        # on the same data.
        with meet(cluster, timeout_seconds=devices["timeout_seconds"]) as meeting:
            meeting.agree(evaluation_facts(data, origin))
            strategy = make_strategy(**devices)
        check_reading(data.sources, strategy, tpu_slice.addresses)
        try:
            return _judge(options, data, origin, strategy)
        except tf.errors.OpError as error:
            raise explain_lost_host(error, tpu_slice.lost) or error from error


def _judge(
    options: EvaluationOptions, data: Data, origin: Origin, strategy: tf.distribute.Strategy
) -> dict[str, dict[str, float]]:
    """Makes and fills the model on the devices, and judges it on each split."""
    model = make_model(options.model, strategy)
    names = next(iter(data.sources.values())).class_names
    pipes = {"eval_ops": options.pipe}
    report = fill(model, origin, options.weights, pipes=pipes, class_names=names)
    check_whole(report, model, origin, options.weights)
    for line in report.remarks():
        logging.warning("%s: %s", origin.path, line)
    judge = Evaluation(options, data, model, strategy)
    results = {}
    for split in data.sources:
        metrics = judge(split)
        assert metrics is not None, "nobody asked to stop"
        results[split] = metrics
    return results


def _note_request(reason: str) -> None:
    """A machine of the TPU is to be taken away; an evaluation has nothing to save."""
    logging.warning("asked to stop: %s", reason)


def script() -> None:
    """The program vit-dist-evaluate: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
