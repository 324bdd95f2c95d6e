"""Averages the weights of several checkpoints.

    python -m vit_dist.soup --checkpoints=runs/a,runs/b:best,runs/c --output=runs/soup
    python -m vit_dist.soup --checkpoints=... --output=runs/soup --greedy='max val/accuracy'
    python -m vit_dist.evaluate --checkpoint=runs/soup

"Model soups" (Wortsman et al., arXiv 2203.05482): runs that were fine-tuned from the same weights,
or steps of one run, often judge better as an average. Each checkpoint is a run's folder (its newest
checkpoint), RUN:best, or a checkpoint's own folder; of a run with a moving average that is taken.
With --greedy the best checkpoint comes first, and each other one is taken only if the average with
it judges no worse (the paper's recipe 1). --config.key=value changes how that is judged.

The output is laid out like a run: evaluate, predict, export, figures and config.init_from read it.
It holds no optimizer, so no training can be resumed from it.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from vit_dist.config.errors import ConfigError
from vit_dist.config.recorded import of_best
from vit_dist.evaluate import evaluate
from vit_dist.evaluators.classification import metric_names
from vit_dist.paths import expand
from vit_dist.run.check import check_evaluation, check_metric, parse_choice
from vit_dist.run.served import TRAINING
from vit_dist.storage.errors import check_bucket
from vit_dist.storage.files import write_whole
from vit_dist.training.checkpoint import Checkpoint, Checkpointer, is_checkpoint, open_checkpoint

# Keys of a run's network that Keras adds, and how the kernels are laid out for a device: weights
# are float32 and have the same shapes in each.
_KERAS = ("name", "trainable", "dtype", "form")


def define_flags() -> None:
    """Defines this command's flags; not at import: other commands have flags of the same names."""
    flags.DEFINE_list("checkpoints", None, "two or more, with commas between; RUN:best, too")
    flags.DEFINE_string("output", None, "folder for the average, as of a run")
    flags.DEFINE_string(
        "greedy", None, "'max NAME/METRIC' or 'min ...', such as 'max val/accuracy': choose by it"
    )
    cli.define_config(default_from="checkpoints")


def main() -> int:
    """The command; returns its exit code."""
    paths, output = flags.FLAGS.checkpoints or [], flags.FLAGS.output
    if len(paths) < 2:
        raise ConfigError("give two checkpoints or more: --checkpoints=runs/a,runs/b")
    if not output:
        raise ConfigError("give a folder for the average: --output=runs/soup")
    check_bucket(output, "--output")
    if flags.FLAGS.greedy:
        _check_free(output)
        paths = choose(cli.load_config(), paths, by=flags.FLAGS.greedy)
    folder = average(paths, output)
    print(f"wrote {folder}, the average of {len(paths)} checkpoints")
    return 0


def choose(config: ConfigDict, paths: Sequence[str], *, by: str) -> list[str]:
    """Which checkpoints to average: the greedy soup of Wortsman et al., recipe 1.

    Prints what each judged. Intermediate averages are written to a temporary folder.

    Args:
      config: how val or config.evals are judged, see evaluate.
      paths: see average.
      by: "max NAME/METRIC" or "min NAME/METRIC", where NAME is "val" or one of config.evals.

    Returns:
      The best checkpoint, then those with which the average judged no worse, best first.

    Raises:
      ConfigError: `by` is malformed or names no metric; also what evaluate and average raise.
    """
    mode, name, metric = parse_choice(by, ["val", *(config.evals or {})], key="--greedy")
    sign = 1 if mode == "max" else -1
    splits, evals = (["val"], []) if name == "val" else ([], [name])
    # Each evaluation checks again; but a metric that is none would be noticed after the first.
    options, data = check_evaluation(config, splits=splits, evals=evals)
    known: Sequence[str] | None
    if name == "val":
        known = metric_names(data.sources["val"].num_classes)
    else:
        known = options.evals[name].metrics
    check_metric(name, metric, known, key="--greedy")

    def judge(checkpoint: str) -> float:
        found = evaluate(config, checkpoint, splits=splits, evals=evals)[name]
        # Where the kind does not tell its metrics before it has judged.
        check_metric(name, metric, list(found), key="--greedy")
        return found[metric]

    def judge_average(chosen: Sequence[str]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return judge(str(average(chosen, f"{folder}/soup")))

    def say(value: float, text: str) -> None:
        print(f"{name}/{metric} {value:.6g}: {text}", flush=True)

    values = {}
    for path in paths:
        values[path] = judge(of_best(path))
        say(values[path], path)
    best, *others = sorted(values, key=lambda path: sign * values[path], reverse=True)
    chosen, reached = [best], values[best]
    for path in others:
        value = judge_average([*chosen, path])
        # NaN is never as good.
        if sign * value >= sign * reached:
            chosen, reached = [*chosen, path], value
            say(value, f"the average with {path}, which is taken")
        else:
            say(value, f"the average with {path}, which is left out")
    return chosen


def average(paths: Sequence[str], output: str) -> epath.Path:
    """Writes the mean of the weights of several checkpoints of one network.

    Args:
      paths: a run's folder, RUN:best, or a checkpoint's folder each.
      output: folder of the average; the config and the classes are those of the first checkpoint.

    Returns:
      The folder.

    Raises:
      ConfigError: the folder holds a run already, or the checkpoints are of different networks or
        classes, which says in what they differ; or a path has no checkpoint.
      DataError: a checkpoint is damaged.
      StorageError: the folder cannot be written.
    """
    folder = _check_free(output)
    found = [open_checkpoint(of_best(path), weights=True) for path in paths]
    try:
        for path, other in zip(paths[1:], found[1:], strict=True):
            _check_alike(paths[0], found[0], path, other)
        weights = [checkpoint.weights() for checkpoint in found]
        arrays = {f"model/{name}": _mean([w[name] for w in weights]) for name in weights[0]}
        notes = {**found[0].notes, "average_of": [str(each.path) for each in found]}
        step = max(checkpoint.step for checkpoint in found)
    finally:
        for checkpoint in found:
            checkpoint.close()
    checkpointer = Checkpointer(folder)
    checkpointer.save(arrays, step=step, notes=notes)
    checkpointer.wait()
    # Last: with it the folder is a run to the commands.
    write_whole(folder / "config.json", json.dumps(notes["config"], indent=2).encode())
    return folder


def _check_free(output: str) -> epath.Path:
    folder = expand(output)
    if is_checkpoint(folder):
        raise ConfigError(f"{output} holds checkpoints already: take another --output")
    return folder


def _mean(tensors: Sequence[Any]) -> np.ndarray:
    """The mean, in the dtype of the first; added up in float64, one tensor in memory at a time."""
    total, dtype = np.float64(0.0), None
    for tensor in tensors:
        value = np.asarray(tensor)
        dtype = dtype or value.dtype
        total = total + value.astype(np.float64)
    return np.asarray(total / len(tensors), dtype)


def _check_alike(path: str, one: Checkpoint, other_path: str, other: Checkpoint) -> None:
    _compare(path, _network(one), other_path, _network(other), "network")
    names = {"class names": one.notes.get("class_names")}
    _compare(path, names, other_path, {"class names": other.notes.get("class_names")}, "data")
    shapes, others = _shapes(one), _shapes(other)
    _compare(path, shapes, other_path, others, "network")


def _network(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a run says of its network, without what only training or speed know."""
    network = {k: v for k, v in checkpoint.notes["model"].items() if k not in (*TRAINING, *_KERAS)}
    # LayerScale is trained: its initial value is no part of the network, but that there is one is.
    scaled = network.get("layer_scale") is not None
    return {**network, "layer_scale": "trained" if scaled else None}


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in checkpoint.weights().items()}


def _compare(
    path: str, one: Mapping[str, Any], other_path: str, other: Mapping[str, Any], what: str
) -> None:
    for key in sorted({*one, *other}):
        if one.get(key) != other.get(key):
            raise ConfigError(
                f"{path} and {other_path} are of different {what}: {key} is {_short(one.get(key))} "
                f"and {_short(other.get(key))}. Only checkpoints of one network and the same "
                "classes can be averaged"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def script() -> None:
    """The program vit-dist-soup: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
