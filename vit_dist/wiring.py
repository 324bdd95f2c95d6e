"""From a config to the parts of a run, checked before any device starts (law 3)."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
from ml_collections import ConfigDict

from vit_dist import config as config_lib
from vit_dist.data.base import Source
from vit_dist.data.order import train_indices
from vit_dist.data.pipe import Pipe, output_spec, parse
from vit_dist.data.pipeline import explain_data_error, make_eval_data, make_train_data
from vit_dist.data.sources import open_source
from vit_dist.model.posemb import METHODS
from vit_dist.model.variants import PRECISIONS, vit_config
from vit_dist.model.vit import build_vit, named_weights, weight_shapes
from vit_dist.strategy import check_strategy, host_replicas, make_strategy, num_hosts
from vit_dist.training.losses import make_loss
from vit_dist.training.optim import check_optimizer, make_optimizer
from vit_dist.training.rules import check_names
from vit_dist.training.schedules import make_schedule
from vit_dist.training.state import TrainState
from vit_dist.training.step import check_step

MAX_SEED = 2**31 - 1  # the step's dropout seeds are int32
_SPLITS = ("train", "val", "test")
_BUILD_KEYS = ("head_bias", "posemb_stddev")  # of config.model, for build_vit; the rest: vit_config


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked config: keyword arguments for every part, and durations in steps."""

    config: ConfigDict
    sources: dict[str, Source]  # split -> source; "train" always, "val" and "test" where named
    train_pipe: Pipe
    eval_pipe: Pipe
    model: dict[str, Any]
    build: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    loss: dict[str, Any]
    step: dict[str, Any]
    strategy: dict[str, Any]
    total_steps: int
    log_steps: int
    eval_steps: int
    save_steps: int

    @property
    def batch_size(self) -> int:
        return self.config.input.batch_size


def check(config: ConfigDict) -> Run:
    """Checks every key of a config and the data it names; touches no device.

    Raises:
      ValueError: the first mistake found; says what was given, what is allowed, what to do.
    """
    config = config_lib.finalize(config)
    strategy = config_lib.bind(make_strategy, config.strategy, name="strategy")
    check_strategy(**strategy)
    optimizer = config_lib.bind(make_optimizer, config.optimizer, name="optimizer", variables={})
    optimizer.pop("variables")
    check_optimizer(**optimizer)
    loss = config_lib.bind(make_loss, config.loss, name="loss")
    make_loss(**loss)
    size = config_lib.parse_image_size(config.image_size)
    _check_ranges(config)
    step = config_lib.bind(
        check_step, config.step, name="step", batch_size=config.input.batch_size,
        num_replicas=max(config.strategy.virtual_cpus, 1),
    )  # fmt: skip
    check_step(**step)
    _durations(config, num_examples=1)  # a mistake there shows before a data set is prepared
    sources = _open_sources(config)
    num_classes = sources["train"].num_classes
    model, build = _check_model(config, size, num_classes)
    patterns = {k: optimizer[k] for k in ("decay_multipliers", "lr_multipliers")}
    if patterns != {k: config_lib.get_defaults().optimizer[k] for k in patterns}:  # takes a second
        check_names(weight_shapes(vit_config(**model)), **patterns)
    pipes = {
        "train": parse(config.input.train_ops, size=size, num_classes=num_classes),
        "eval": parse(config.input.eval_ops, size=size, num_classes=num_classes),
    }
    _check_images(sources, pipes, size)
    durations = _durations(config, sources["train"].num_examples)
    schedule = _bind_schedule(config, durations["total"], sources["train"].num_examples)
    make_schedule(**schedule)
    return Run(
        config=config,
        sources=sources,
        train_pipe=pipes["train"],
        eval_pipe=pipes["eval"],
        model=model,
        build=build,
        optimizer=optimizer,
        schedule=schedule,
        loss=loss,
        step=step,
        strategy=strategy,
        total_steps=durations["total"],
        log_steps=max(durations["log"], 1),
        eval_steps=durations["eval"],
        save_steps=durations["save"],
    )


def _check_ranges(config: ConfigDict) -> None:
    least = {
        "keep_checkpoints": config.keep_checkpoints,
        "input.batch_size": config.input.batch_size,
        "input.eval_batch_size": config.input.eval_batch_size,
        "input.prefetch": config.input.prefetch,
    }
    for key, value in least.items():
        if value < 1:
            raise ValueError(f"config.{key} must be 1 or more, got {value}")
    if not 0 <= config.seed <= MAX_SEED:
        raise ValueError(f"config.seed must be in 0..{MAX_SEED}, got {config.seed}")
    if config.input.num_threads is not None and config.input.num_threads < 1:
        raise ValueError("config.input.num_threads must be 1 or more, or None for all cores")
    allowed = {"precision": tuple(PRECISIONS), "posemb_method": METHODS}
    for key, names in allowed.items():
        if config[key] not in names:
            raise ValueError(
                f"config.{key} {config[key]!r} is unknown; allowed: {', '.join(names)}"
            )


def _open_sources(config: ConfigDict) -> dict[str, Source]:
    options = {k: v for k, v in config.data.items() if not k.endswith("_split") and k != "source"}
    splits = {s: config.data[f"{s}_split"] for s in _SPLITS if config.data[f"{s}_split"]}
    if "train" not in splits:
        raise ValueError("config.data.train_split must name a split")
    sources = {k: open_source(config.data.source, split=v, **options) for k, v in splits.items()}
    for name, source in sources.items():
        if source.num_classes != sources["train"].num_classes:
            raise ValueError(
                f"split {name!r} has {source.num_classes} classes, "
                f"train has {sources['train'].num_classes}"
            )
    return sources


def _check_model(
    config: ConfigDict, size: tuple[int, int], num_classes: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    section = {k: v for k, v in config.model.items() if k not in _BUILD_KEYS}
    model = config_lib.bind(
        vit_config, section, name="model", image_size=size, num_classes=num_classes
    )
    build = config_lib.bind(
        build_vit,
        {k: v for k, v in config.model.items() if k in _BUILD_KEYS},
        name="model",
        config=vit_config(**model),
        seed=config.seed,
        precision=config.precision,
    )
    if model["pool"] == "none":
        raise ValueError("config.model.pool 'none' gives one output per token; not for training")
    return model, build


def _check_images(
    sources: Mapping[str, Source], pipes: Mapping[str, Pipe], size: tuple[int, int]
) -> None:
    for name, source in sources.items():
        key = "train" if name == "train" else "eval"
        spec = output_spec(source, pipes[key])
        for needed in ("image", "label"):
            if needed not in spec:
                raise ValueError(f"config.input.{key}_ops must keep '{needed}': {pipes[key]}")
        got = tuple(spec["image"].shape)
        if got != (*size, 3):
            raise ValueError(
                f"config.input.{key}_ops gives images of {got}, but config.image_size is {size}: "
                "end the pipe with resize(size) or a crop to size"
            )
        if not any(step.op.on_device for step in pipes[key].steps):
            raise ValueError(
                f"config.input.{key}_ops leaves images at 0..255: add value_range(-1, 1), as the "
                "reference's checkpoints take them, or normalize('imagenet')"
            )


def _durations(config: ConfigDict, num_examples: int) -> dict[str, int]:
    known = {"batch_size": config.input.batch_size, "num_examples": num_examples}
    total = config_lib.duration(config, "total", **known)
    durations = {"total": total}
    for name in ("log", "eval", "save"):
        durations[name] = config_lib.duration(config, name, **known, total_steps=total)
    return durations


def _bind_schedule(config: ConfigDict, total_steps: int, num_examples: int) -> dict[str, Any]:
    steps = {
        f"{name}_steps": config_lib.duration(
            config.schedule,
            name,
            batch_size=config.input.batch_size,
            num_examples=num_examples,
            total_steps=total_steps,
            where="config.schedule",
        )
        for name in ("warmup", "cooldown", "timescale", "hold")
    }
    return config_lib.bind(
        make_schedule,
        config_lib.without_durations(config.schedule),
        name="schedule",
        learning_rate=config.optimizer.learning_rate,
        total_steps=total_steps,
        **steps,
    )


def make_state(run: Run, strategy: tf.distribute.Strategy) -> TrainState:
    """Model, optimiser and moving average, new, under the strategy's scope."""
    with strategy.scope():
        model = build_vit(**run.build)
        optimizer = make_optimizer(named_weights(model), **run.optimizer)
        ema = build_vit(**run.build) if run.step["ema_decay"] else None
        return TrainState(model, optimizer, ema)


def train_data(run: Run, strategy: tf.distribute.Strategy, *, first_step: int) -> Any:
    """The distributed training set from the batch of `first_step` on."""
    local = host_replicas(strategy)
    dataset = make_train_data(
        run.sources["train"],
        run.train_pipe,
        batch_size=run.batch_size,
        seed=run.config.seed,
        first_step=first_step,
        num_replicas=strategy.num_replicas_in_sync,
        local_replicas=local,
        num_threads=run.config.input.num_threads,
        prefetch=run.config.input.prefetch * len(local),
    )
    return strategy.distribute_datasets_from_function(lambda _: dataset)


def eval_data(run: Run, strategy: tf.distribute.Strategy, split: str) -> Any:
    """A distributed evaluation set: each example once, padding masked."""
    replicas = strategy.num_replicas_in_sync
    dataset = make_eval_data(
        run.sources[split],
        run.eval_pipe,
        # At most one padded batch: a small split would be mostly padding otherwise.
        batch_size=_eval_batch(run, split, replicas),
        num_replicas=replicas,
        local_replicas=host_replicas(strategy),
        num_threads=run.config.input.num_threads,
    )
    return strategy.distribute_datasets_from_function(lambda _: dataset)


def _eval_batch(run: Run, split: str, replicas: int) -> int:
    needed = min(run.config.input.eval_batch_size, run.sources[split].num_examples)
    return -(-needed // replicas) * replicas


def explain_error(
    error: Exception,
    run: Run,
    strategy: tf.distribute.Strategy,
    *,
    split: str,
    steps: range = range(0),
) -> Exception | None:
    """What to raise in place of a TensorFlow error: the damaged example, or the lost worker.

    Args:
      error: what running or reading raised.
      run: the checked config.
      strategy: what it ran on.
      split: what was being read.
      steps: of the training data, those that may have been read.

    Returns:
      None where nothing better can be said.
    """
    lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
    if num_hosts(strategy) > 1 and isinstance(error, (*lost, tf.errors.CancelledError)):
        found = re.search(r"Collective (?:ops is|has)[^\n]*", error.message)
        what = found[0] if found else type(error).__name__
        return ConnectionError(
            "lost another worker; its own log says why. Start all of them again: they go on from "
            f"the newest checkpoint. ({what[:300]})"
        )
    ours = (tf.errors.ResourceExhaustedError, tf.errors.InternalError)  # not for want of good data
    if not isinstance(error, tf.errors.OpError) or isinstance(error, ours):
        return None
    source = run.sources[split]
    indices: Sequence[int] = ()
    if source.indexable and steps:
        indices = train_indices(
            num_examples=source.num_examples,
            batch_size=run.batch_size,
            seed=run.config.seed,
            first_step=steps.start,
            num_steps=len(steps),
        ).tolist()
    pipe = run.train_pipe if split == "train" else run.eval_pipe
    reason = explain_data_error(source, error, pipe=pipe, indices=indices)
    return None if reason is None else ValueError(reason)
