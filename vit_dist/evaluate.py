"""Evaluates a checkpoint, at any resolution.

python -m vit_dist.evaluate --checkpoint RUN [--splits val,test] [--evals NAME,...] [--config FILE]

Judges the splits, and what config.evals names (docs/judging.md). Without --config the config that
the run recorded is taken; keys of either can be changed by --config.key=value. The config says how
the model is built and how images are prepared. If its resolution differs from the checkpoint's,
positions are resampled as config.init_from does it.
"""

import csv
import functools
import io
import json
import math
from collections.abc import Mapping, Sequence

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
from vit_dist.evaluators.registry import LOGITS
from vit_dist.run.build import Evaluation, make_model
from vit_dist.run.check import check_evaluation
from vit_dist.run.evals import Evals
from vit_dist.run.explain import explain_lost_host
from vit_dist.run.facts import evaluation_facts
from vit_dist.run.options import Data, EvaluationOptions
from vit_dist.run.origins import Origin, open_origin
from vit_dist.run.sources import SPLITS
from vit_dist.run.start import check_whole, fill
from vit_dist.run.tpu_hosts import check_reading, tpu_hosts
from vit_dist.storage.errors import check_bucket
from vit_dist.storage.files import write_output

Results = dict[str, dict[str, float]]


def define_flags() -> None:
    """Defines this command's flags."""
    cli.define_config(default_from="checkpoint")
    flags.DEFINE_string("checkpoint", None, "a run's folder, or one checkpoint's")
    flags.DEFINE_list(
        "splits", None, "of train, val, test; all but train by default, none by --splits="
    )
    flags.DEFINE_list("evals", None, "of the names in config.evals; all by default")
    flags.DEFINE_string("features", "", "folder that keeps features and logits for later")
    flags.DEFINE_string("json", None, "file for the results: {name: {metric: value}}")
    flags.DEFINE_string("csv", None, "file for the results: rows of name, metric, value")


def main() -> int:
    """The command; returns its exit code."""
    checkpoint = flags.FLAGS.checkpoint
    if not checkpoint:
        raise ConfigError("give a trained run: --checkpoint runs/NAME")
    config = cli.load_config()
    options = flags.FLAGS
    files = {"--json": options.json, "--csv": options.csv}
    for flag, path in {**files, "--features": options.features}.items():
        if path:
            check_bucket(path, flag)
    results = evaluate(
        config,
        checkpoint,
        splits=options.splits,
        evals=options.evals,
        features_dir=options.features,
    )
    show(results, title=f"{checkpoint} at {config.image_size} px")
    if options.json:
        text = json.dumps(_without_nan(results), indent=2, allow_nan=False) + "\n"
        write_output(options.json, text.encode())
    if options.csv:
        write_output(options.csv, as_csv(results).encode())
    return 0


def show(results: Mapping[str, Mapping[str, float]], *, title: str) -> None:
    """Prints a table of the splits, and one of all metrics of the other evaluations."""
    columns = ("split", "accuracy", "top5_accuracy", "loss", "examples")
    splits = Table(title=title)
    for column in columns:
        splits.add_column(column, justify="left" if column == "split" else "right")
    others = Table(title="config.evals")
    for column in ("name", "metric", "value"):
        others.add_column(column, justify="right" if column == "value" else "left")
    for name, metrics in results.items():
        if name in SPLITS:
            cells = [f"{metrics[c]:.4f}" if c in metrics else "-" for c in columns[1:4]]
            splits.add_row(name, *cells, f"{metrics['examples']:.0f}")
            continue
        for metric, value in metrics.items():
            # Six digits: accuracies of 50,000 examples differ in the fifth.
            others.add_row(name, metric, f"{value:.6g}")
    for table in (splits, others):
        if table.row_count:
            Console().print(table)


def as_csv(results: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each metric: name, metric, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "metric", "value"))
    for name, metrics in results.items():
        writer.writerows((name, metric, repr(value)) for metric, value in metrics.items())
    return text.getvalue()


def _without_nan(results: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """NaN and infinities as None: JSON has neither."""
    return {
        name: {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        for name, metrics in results.items()
    }


def evaluate(
    config: ConfigDict,
    checkpoint: str,
    *,
    splits: Sequence[str] | None = None,
    evals: Sequence[str] | None = None,
    features_dir: str = "",
) -> Results:
    """Evaluates the weights (the moving average where there is one) of a checkpoint.

    Args:
      config: the model, data and input sections count; no training split is needed.
      checkpoint: folder of a run or of one checkpoint.
      splits: which of "train", "val", "test"; None for val and test, those that are configured.
        Empty for none: features can be judged without a head for the classes of the data.
      evals: which names of config.evals; None for all.
      features_dir: folder that keeps what the model gives for a split, for later calls; "" for
        nowhere.

    Returns:
      split -> metrics, see evaluators.classification.make_evaluator; then name -> metrics of each
      of config.evals.

    Raises:
      ConfigError: no such split or checkpoint, or a checkpoint that does not fit the config or has
        no head for the classes of the data.
      DataError: an example cannot be read.
    """
    options, data = check_evaluation(config, splits=splits, evals=evals)
    origin = open_origin(checkpoint, image_size=options.weights.image_size)
    devices = options.strategy
    cluster = choose_cluster(devices["name"], devices["tpu"])
    with tpu_hosts(devices, _note_request) as tpu_slice:
        # As in train: before a device starts, several hosts prove that they judge the same weights
        # on the same data.
        with meet(cluster, timeout_seconds=devices["timeout_seconds"]) as meeting:
            meeting.agree(evaluation_facts(options, data, origin))
            strategy = make_strategy(**devices)
        check_reading(data.sources, strategy, tpu_slice.addresses)
        try:
            return _judge(options, data, origin, strategy, features_dir)
        except tf.errors.OpError as error:
            raise explain_lost_host(error, tpu_slice.lost) or error from error


def _judge(
    options: EvaluationOptions,
    data: Data,
    origin: Origin,
    strategy: tf.distribute.Strategy,
    features_dir: str,
) -> Results:
    """Makes and fills the model on the devices, and judges it on each split."""
    model = make_model(options.model, strategy)
    names = next(iter(data.sources.values())).class_names
    pipes = {"config.input.eval_ops": options.pipe}
    pipes |= {entry.where: entry.pipe for entry in options.evals.values()}
    fill_model = functools.partial(
        fill, origin=origin, options=options.weights, pipes=pipes, class_names=names
    )
    report = fill_model(model)
    splits = list(data.splits)
    # Features are judged whatever the head is.
    headless = not splits and all(e.kind.values != LOGITS for e in options.evals.values())
    check_whole(report, model, origin, options.weights, headless=headless)
    for line in report.remarks():
        logging.warning("%s: %s", origin.path, line)
    judge = Evaluation(options, data, model, strategy)
    # Evaluations at another resolution get the checkpoint's own positions, resampled once.
    named = Evals(options, data, model, strategy, folder=features_dir, fill=fill_model)
    results = {}
    for name in (*splits, *options.evals):
        metrics = judge(name) if name in splits else named(name)
        assert metrics is not None, "nobody asked to stop"
        results[name] = metrics
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
