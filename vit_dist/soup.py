"""Averages the weights of several checkpoints.

    python -m vit_dist.soup --checkpoints=runs/a,runs/b:best,runs/c --output=runs/soup
    python -m vit_dist.evaluate --checkpoint=runs/soup

"Model soups" (Wortsman et al., arXiv 2203.05482): runs that were fine-tuned from the same weights,
or steps of one run, often judge better as an average. Each checkpoint is a run's folder (its newest
checkpoint), RUN:best, or a checkpoint's own folder; of a run with a moving average that is taken.
The output is laid out like a run: evaluate, predict, export, figures and config.init_from read it.
It holds no optimizer, so no training can be resumed from it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import numpy as np
from absl import flags
from etils import epath

from vit_dist.config.errors import ConfigError
from vit_dist.config.recorded import of_best
from vit_dist.paths import expand
from vit_dist.storage.errors import check_bucket
from vit_dist.storage.files import write_whole
from vit_dist.training.checkpoint import Checkpoint, Checkpointer, is_checkpoint, open_checkpoint


def define_flags() -> None:
    """Defines this command's flags; not at import: other commands have flags of the same names."""
    flags.DEFINE_list("checkpoints", None, "two or more, with commas between; RUN:best, too")
    flags.DEFINE_string("output", None, "folder for the average, as of a run")


def main() -> int:
    """The command; returns its exit code."""
    paths, output = flags.FLAGS.checkpoints or [], flags.FLAGS.output
    if len(paths) < 2:
        raise ConfigError("give two checkpoints or more: --checkpoints=runs/a,runs/b")
    if not output:
        raise ConfigError("give a folder for the average: --output=runs/soup")
    check_bucket(output, "--output")
    folder = average(paths, output)
    print(f"wrote {folder}, the average of {len(paths)} checkpoints")
    return 0


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
    folder = expand(output)
    if is_checkpoint(folder):
        raise ConfigError(f"{output} holds checkpoints already: take another --output")
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


def _mean(tensors: Sequence[Any]) -> np.ndarray:
    """The mean, in the dtype of the first; added up in float64, one tensor in memory at a time."""
    total, dtype = np.float64(0.0), None
    for tensor in tensors:
        value = np.asarray(tensor)
        dtype = dtype or value.dtype
        total = total + value.astype(np.float64)
    return np.asarray(total / len(tensors), dtype)


def _check_alike(path: str, one: Checkpoint, other_path: str, other: Checkpoint) -> None:
    _compare(path, one.notes["model"], other_path, other.notes["model"], "network")
    names = {"class names": one.notes.get("class_names")}
    _compare(path, names, other_path, {"class names": other.notes.get("class_names")}, "data")
    shapes, others = _shapes(one), _shapes(other)
    _compare(path, shapes, other_path, others, "network")


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
