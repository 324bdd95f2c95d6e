"""Evaluates a checkpoint, at any resolution.

python -m vit_dist.evaluate --config FILE --checkpoint RUN [--splits val,test]

The config says how the model is built and the images are prepared; where its resolution is not the
checkpoint's, positions are resampled as config.init_from would.
"""

from collections.abc import Sequence

from vit_dist.run import cli  # before TensorFlow, whose start-up notices it turns down

# isort: split
import tensorflow as tf
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from vit_dist.cluster.hosts import device_kind
from vit_dist.cluster.strategy import make_strategy
from vit_dist.evaluators.classification import make_evaluator
from vit_dist.run.build import make_state
from vit_dist.run.check import check
from vit_dist.run.explain import explain_error
from vit_dist.run.input import eval_data
from vit_dist.run.start import init_from
from vit_dist.training.losses import make_loss
from vit_dist.training.step import choose_jit


def define_flags() -> None:
    """Defines this command's flags."""
    cli.define_config()
    flags.DEFINE_string("checkpoint", None, "a run's folder, or one checkpoint's")
    flags.DEFINE_list("splits", None, "of train, val, test; all but train by default")


def main() -> int:
    """The command; returns its exit code."""
    config = cli.load_config()
    if not flags.FLAGS.checkpoint:
        raise ValueError("give a trained run: --checkpoint runs/NAME")
    results = evaluate(config, flags.FLAGS.checkpoint, splits=flags.FLAGS.splits)
    table = Table(title=f"{flags.FLAGS.checkpoint} at {config.image_size} px")
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
      config: finalised; the model, data and input sections count.
      checkpoint: folder of a run or of one checkpoint.
      splits: of "train", "val", "test"; None for val and test, as far as configured.

    Returns:
      split -> metrics, see make_evaluator.

    Raises:
      ValueError: no such split or checkpoint, or one that does not fit the config, or without a
        head for its classes.
    """
    run = check(config)
    splits = [s for s in ("val", "test") if s in run.sources] if splits is None else splits
    for split in splits:
        if split not in run.sources:
            raise ValueError(f"split {split!r} is not configured; there are {sorted(run.sources)}")
    strategy = make_strategy(**run.strategy)
    state = make_state(run, strategy)
    report = init_from(state, checkpoint, run)
    for name in report.new:
        if name.startswith("head/"):
            raise ValueError(f"{checkpoint} cannot classify this data: it would need {name}")
    replicas = strategy.num_replicas_in_sync
    jit = choose_jit(run.step["jit"], kind=device_kind(strategy), num_replicas=replicas)
    evaluator = make_evaluator(
        state.eval_model,
        make_loss(name=run.loss["name"]),
        strategy=strategy,
        preprocess=run.eval_pipe.device,
        jit=jit != "off",
    )
    results = {}
    for split in splits:
        try:
            results[split] = evaluator(eval_data(run, strategy, split))
        except tf.errors.OpError as error:
            raise explain_error(error, run, strategy, split=split) or error from error
    return results


def script() -> None:
    """The program vit-dist-evaluate: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
