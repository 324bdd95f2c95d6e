"""Where a run begins: resume > resume_from > init_from > scratch."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from vit_dist.config.defaults import changes
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data.ops.pipe import Pipe
from vit_dist.data.sources.fingerprint import compare
from vit_dist.data.sources.source import Source
from vit_dist.model.classes import match_classes
from vit_dist.model.vit import ViT, named_weights
from vit_dist.model.weights import LoadReport
from vit_dist.monitoring.log import detail
from vit_dist.run.options import Data, RunOptions, WeightsOptions
from vit_dist.run.origins import Origin, open_origin, scaled
from vit_dist.training.checkpoint import Checkpoint, Checkpointer, open_checkpoint
from vit_dist.training.state import TrainState

# Keys of the config that decide which examples a step sees, in which order.
_ORDER = ("seed:", "input.batch_size:", "input.repeats:", "data.")
_NOT_ORDER = ("data.val_split:", "data.test_split:", "data.counts:")
# Where the data lies, and in which kind of file, does not decide which examples a step sees: the
# data's fingerprint tells whether the examples are the same, and come in the same order.
_WHERE = (
    "data.data_dir:",
    "data.files:",
    "data.file_format:",
    "data.stream:",
    "data.class_file:",
    "data.parts:",
)


# Names of the head's variables.
_HEAD = "head/"


class Start(NamedTuple):
    """Where a run begins."""

    how: str  # resume | resume_from | init_from | scratch
    checkpoint: Checkpoint | None
    origin: Origin | None = None  # of init_from
    damaged: Collection[str] = ()  # names of checkpoints of the workdir that were passed over


def find_start(workdir: str, options: RunOptions) -> Start:
    """Finds and reads the checkpoint to begin with; touches no device.

    Raises:
      ConfigError: resume_from or init_from names a place without a checkpoint, resume_from one of
        the last step or beyond, or the workdir's checkpoint is of a run with another order of the
        data.
      DataError: there are checkpoints, and none is whole.
      StorageError: a checkpoint cannot be read at the moment.
    """
    # The workdir's own checkpoint wins over resume_from and init_from: the same command run again
    # after an interruption has to go on, not to begin again.
    checkpointer = Checkpointer(workdir)
    found = checkpointer.newest()
    if found is not None:
        _check_order(found, options.record)
        return Start("resume", found, damaged=checkpointer.damaged)
    if options.resume_from:
        found = open_checkpoint(options.resume_from)
        if found.step >= options.total_steps:
            raise ConfigError(
                f"nothing would be trained: config.resume_from={options.resume_from} is a "
                f"checkpoint of step {found.step}, and the run has {options.total_steps} steps: "
                "raise config.total_steps (or the unit that is set), or begin at step 0 with its "
                "weights by config.init_from"
            )
        return Start("resume_from", found)
    if options.init_from:
        weights = options.evaluation.weights
        origin = open_origin(options.init_from, image_size=weights.image_size)
        return Start("init_from", origin.checkpoint, origin)
    return Start("scratch", None)


def check_data(start: Start, data: Data) -> None:
    """Compares the training examples and their order with those that the checkpoint was trained on.

    Raises:
      DataError: on a resume, if examples were added, removed, renamed or replaced since, or can
        only be read in another order. Going on from another run (resume_from) is a warning only.
    """
    checkpoint, source = start.checkpoint, data.sources["train"]
    if checkpoint is None or start.how == "init_from":
        return
    if start.how != "resume":
        _check_classes(checkpoint, source)
    then = checkpoint.notes.get("data")
    if then is None:
        return
    # A source that can read its files by index and as a stream takes the way of the checkpoint.
    if start.how == "resume" and "order" in then:
        source.follow(then["order"])
    other, noticed = compare(then, source.fingerprint())
    for line in noticed:
        logging.warning(
            "the training data is not quite what it was at step %d: %s. Files that were repaired "
            "are fine; if others were replaced, start in another workdir",
            checkpoint.step,
            line,
        )
    if not other:
        return
    text = (
        f"the training data has changed since step {checkpoint.step} was saved ({'; '.join(other)})"
    )
    if start.how == "resume":
        raise DataError(
            f"{text}: put it back (or mask damaged examples with config.input.on_bad_example=mask "
            "rather than remove them), or start in another workdir with config.resume_from"
        )
    logging.warning("%s", text)


def _check_classes(checkpoint: Checkpoint, source: Source) -> None:
    """Raises DataError where the head's outputs would come to mean other classes."""
    names = checkpoint.notes.get("class_names", ())
    match = match_classes(names, source.class_names)
    if match.order is not None or (match.other and len(names) == source.num_classes):
        why = match.other or "its classes are those of the data in another order"
        raise DataError(
            f"config.resume_from takes the head of {checkpoint.path} as it is, and {why}: take "
            "config.init_from, which maps or renews it, or give the classes the same names"
        )


def _check_order(found: Checkpoint, record: Mapping[str, object]) -> None:
    """Raises ConfigError where the config now asks for another order of the examples."""
    known = found.notes.get("data") or {}
    # A fingerprint without "order" (version 0.1) tells neither order nor contents; then the keys in
    # _WHERE, the paths, are all there is to compare.
    other = (*_NOT_ORDER, *_WHERE) if "order" in known else _NOT_ORDER
    changed = [c for c in changes(found.notes["config"], record) if not c.startswith(other)]
    order = [c for c in changed if c.startswith(_ORDER)]
    if order:
        raise ConfigError(
            f"the workdir holds step {found.step} of a run with another order of the data "
            f"({'; '.join(order)}): use the same, or start in another workdir with "
            "config.resume_from or config.init_from"
        )


def restore_or_init(state: TrainState, options: RunOptions, data: Data, start: Start) -> str:
    """Fills the state from the start's checkpoint or weights; returns lines that say what was done.

    Raises:
      ConfigError: the checkpoint does not fit the config.
    """
    if start.origin is not None:
        pipes = {
            "config.input.train_ops": options.input.pipe,
            "config.input.eval_ops": options.evaluation.pipe,
            **{entry.where: entry.pipe for entry in options.evaluation.evals.values()},
        }
        report = fill(
            state.model,
            start.origin,
            options.evaluation.weights,
            pipes=pipes,
            class_names=data.sources["train"].class_names,
        )
        # TrainState copied the initial weights into the average; now it begins at the loaded ones.
        if state.ema is not None:
            for average, weight in zip(state.ema.weights, state.model.weights, strict=True):
                average.assign(weight)
        if start.origin.checkpoint is not None:
            start.origin.checkpoint.close()
        detail("weights from %s:\n%s", start.origin.path, report.full())
        return f"weights from {start.origin.path}\n{report}"
    checkpoint = start.checkpoint
    if checkpoint is None:
        return "starting from scratch"
    for change in changes(checkpoint.notes["config"], options.record):
        logging.warning("going on with a changed config: %s", change)
    arrays = checkpoint.arrays
    if checkpoint.notes["config"]["precision"] != options.model.precision:
        # Loss scaling restarts from the new state's values. float32's scale of 1 would be none for
        # float16, and float16's scale would stay in float32, whose gradients nothing divides by it.
        fresh = {name: getattr(state, name).numpy() for name in ("loss_scale", "good_steps")}
        arrays = {**arrays, **fresh}
    state.from_arrays(arrays)
    # An open file takes up room even after the run has pruned its checkpoint.
    checkpoint.close()
    verb = "resumed from" if start.how == "resume" else "continuing from"
    return f"{verb} step {checkpoint.step} ({checkpoint.path})"


def fill(
    model: ViT,
    origin: Origin,
    options: WeightsOptions,
    *,
    pipes: Mapping[str, Pipe],
    class_names: Sequence[str],
) -> LoadReport:
    """Gives weights from elsewhere to a model.

    Args:
      model: new.
      origin: the opened weights.
      options: how the weights are fitted to the model.
      pipes: config key -> pipe; each must scale images as the weights were trained.
      class_names: of the data, in the order of its labels. A head for the same names in another
        order is reordered; where the names differ the head stays new.

    Raises:
      ConfigError: the weights are of another network, or of images scaled otherwise.
    """
    _check_scaling(origin, pipes, model.channels)
    report = origin.fill(
        model,
        method=options.posemb_method,
        patch_method=options.patch_method,
        ignore=options.ignore,
        class_names=class_names,
    )
    if origin.black_and_white(model.channels) is None:
        report.assumed.append("images scaled as config.input says, which the file does not tell")
    return report


def check_whole(
    report: LoadReport,
    model: ViT,
    origin: Origin,
    options: WeightsOptions,
    *,
    headless: bool = False,
) -> None:
    """Checks what `fill` did to a model that is judged and not trained.

    Args:
      report: of `fill`.
      model, origin, options: what `fill` was given.
      headless: whether only the model's features are judged, so that its head may be any.

    Raises:
      ConfigError: a part of the model is new, or a part of the weights was left out.
    """
    # A head that is new because the pooling differs tells of other features, and is refused.
    free = [x for x in report.new if x.startswith(_HEAD) and not x.endswith(" differs")]
    new = [line for line in report.new if not (headless and line in free)]
    if new:
        raise ConfigError(f"{origin.path} cannot classify this data: it would need {new[0]}")
    for name in sorted(set(origin.tensors) - set(named_weights(model))):
        if headless and name.startswith(_HEAD):
            continue
        if not options.ignore or not re.search(options.ignore, name):
            raise ConfigError(
                f"{origin.path} has {name}, which the config's model has no place for: what would "
                "be evaluated is another network. Build it as it was trained (config.model)"
            )


def _check_scaling(origin: Origin, pipes: Mapping[str, Pipe], channels: int) -> None:
    """Raises ConfigError where a pipe scales images otherwise than the weights were trained on.

    Two pixels, black and white, tell any linear scaling, by whichever op it is written.
    """
    expected = origin.black_and_white(channels)
    # The file does not tell, or weights of colour images were fitted to grey ones.
    if expected is None or expected.shape[1] not in (1, channels):
        return
    for key, pipe in pipes.items():
        got = scaled(pipe, channels)
        # 2e-2: the mean and deviation of ImageNet are published with two to four digits.
        if np.allclose(got, expected, atol=2e-2):
            continue
        op = "the same op as the run did"
        if origin.mean is not None and origin.std is not None:
            op = f"normalize({tuple(origin.mean)}, {tuple(origin.std)})"
            if np.allclose(expected, [[-1], [1]], atol=1e-3):
                op = "value_range(-1, 1)"
        said, have = (np.round(v, 3).tolist() for v in (expected, got))
        raise ConfigError(
            f"the weights of {origin.path} take black as {said[0]} and white as {said[1]}; "
            f"{key} gives {have[0]} and {have[1]}: scale with {op}"
        )
