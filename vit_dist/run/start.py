"""Where a run begins: resume > resume_from > init_from > scratch."""

import json
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from ml_collections import ConfigDict

from vit_dist.cluster.hosts import all_hosts
from vit_dist.config import defaults as config_lib
from vit_dist.data.ops.pipe import Pipe
from vit_dist.model.weights import LoadReport
from vit_dist.paths import check_bucket
from vit_dist.run.check import Run
from vit_dist.run.origins import Origin, open_origin, scaled
from vit_dist.training.checkpoint import Checkpoint, Checkpointer, open_checkpoint
from vit_dist.training.state import TrainState


class Start(NamedTuple):
    """Where a run begins."""

    how: str  # resume | resume_from | init_from | scratch
    checkpoint: Checkpoint | None
    origin: Origin | None = None  # of init_from


def find_start(workdir: str, config: ConfigDict) -> Start:
    """Finds and reads the checkpoint to begin with; touches no device.

    Raises:
      ValueError: there is none where one was named, the workdir's has another order of the data, or
        its bucket is not there.
    """
    check_bucket(workdir, "--workdir")
    found = Checkpointer(workdir).newest()
    if found is not None:
        _check_order(found, config)
        return Start("resume", found)
    if config.resume_from:
        return Start("resume_from", open_checkpoint(config.resume_from))
    if config.init_from:
        origin = open_origin(config.init_from, image_size=config.init_image_size)
        return Start("init_from", origin.checkpoint, origin)
    return Start("scratch", None)


def check_hosts(start: Start, strategy: tf.distribute.Strategy) -> None:
    """All hosts must begin with the same checkpoint."""
    mine = -1 if start.checkpoint is None else start.checkpoint.step
    steps = sorted(set(all_hosts(strategy, mine)))
    if len(steps) > 1:
        raise ValueError(
            f"the hosts see different checkpoints (steps {steps}; -1 for none): the workdir must "
            "be on storage that all of them share"
        )


def check_data(start: Start, run: Run) -> None:
    """The training examples must be those of the checkpoint: their order depends on their number.

    Raises:
      ValueError: resuming, and some were added, removed or renamed since.
    """
    checkpoint = start.checkpoint
    if checkpoint is None or start.how == "init_from":
        return
    then, now = checkpoint.notes.get("data"), run.sources["train"].fingerprint()
    if then is None or then == now:
        return
    what = "; ".join(config_lib.changes(then, now))
    text = f"the training data has changed since step {checkpoint.step} was saved ({what})"
    if start.how == "resume":
        raise ValueError(
            f"{text}: put it back (or mask damaged examples with config.input.on_bad_example=mask "
            "rather than remove them), or start in another workdir with config.resume_from"
        )
    logging.warning("%s", text)


def _check_order(found: Checkpoint, config: ConfigDict) -> None:
    judged = ("data.val_split:", "data.test_split:")  # not trained on
    deciding = ("seed:", "input.batch_size:", "data.")
    changed = [c for c in _changes(found, config) if not c.startswith(judged)]
    order = [c for c in changed if c.startswith(deciding)]
    if order:
        raise ValueError(
            f"the workdir holds step {found.step} of a run with another order of the data "
            f"({'; '.join(order)}): use the same, or start in another workdir with "
            "config.resume_from or config.init_from"
        )


def _changes(found: Checkpoint, config: ConfigDict) -> list[str]:
    return config_lib.changes(found.notes["config"], json.loads(config_lib.to_json(config)))


def restore_or_init(state: TrainState, run: Run, start: Start) -> str:
    """Gives the state what the start holds; returns lines that say what was done.

    Raises:
      ValueError: the checkpoint does not fit the config.
    """
    if start.origin is not None:
        report = _adopt(state, start.origin, run)
        logging.info("weights from %s:\n%s", start.origin.path, report.full())
        return f"weights from {start.origin.path}\n{report}"
    checkpoint = start.checkpoint
    if checkpoint is None:
        return "starting from scratch"
    for change in _changes(checkpoint, run.config):
        logging.warning("going on with a changed config: %s", change)
    arrays = dict(checkpoint.arrays)
    if checkpoint.notes["config"]["precision"] != run.config.precision:
        # Loss scaling begins anew: another precision's scale is none, or one that nothing undoes.
        arrays |= {name: getattr(state, name).numpy() for name in ("loss_scale", "good_steps")}
    state.from_arrays(arrays)
    verb = "resumed from" if start.how == "resume" else "continuing from"
    return f"{verb} step {checkpoint.step} ({checkpoint.path})"


def init_from(state: TrainState, path: str, run: Run) -> LoadReport:
    """Takes the weights (the moving average where there is one) of another run, or of a file.

    Returns:
      The load report.

    Raises:
      ValueError: no weights there, or those of another network.
    """
    return _adopt(state, open_origin(path, image_size=run.config.init_image_size), run)


def _adopt(state: TrainState, origin: Origin, run: Run) -> LoadReport:
    _check_scaling(origin, {"train": run.train_pipe, "eval": run.eval_pipe}, state.model.channels)
    report = origin.fill(
        state.model,
        method=run.config.posemb_method,
        patch_method=run.config.patch_method,
        ignore=run.config.init_ignore,
    )
    if origin.black_and_white(state.model.channels) is None:
        report.assumed.append("images scaled as config.input says, which the file does not tell")
    if state.ema is not None:
        for average, weight in zip(state.ema.weights, state.model.weights, strict=True):
            average.assign(weight)
    return report


def _check_scaling(origin: Origin, pipes: dict[str, Pipe], channels: int) -> None:
    """What a black and a white pixel become must be what the weights were trained on."""
    expected = origin.black_and_white(channels)
    if expected is None or expected.shape[1] not in (1, channels):
        return  # nothing tells, or colours became grey
    for name, pipe in pipes.items():
        got = scaled(pipe, channels)
        if np.allclose(got, expected, atol=2e-2):
            continue
        op = "the same op as the run did"
        if origin.mean is not None and origin.std is not None:
            op = f"normalize({tuple(origin.mean)}, {tuple(origin.std)})"
            if np.allclose(expected, [[-1], [1]], atol=1e-3):
                op = "value_range(-1, 1)"
        said, have = (np.round(v, 3).tolist() for v in (expected, got))
        raise ValueError(
            f"the weights of {origin.path} take black as {said[0]} and white as {said[1]}; "
            f"config.input.{name}_ops gives {have[0]} and {have[1]}: scale with {op}"
        )
