"""From a config to the parts of a run, checked before any device starts (law 3)."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_dist.cluster.strategy import check_strategy, make_strategy
from vit_dist.config import defaults as config_lib
from vit_dist.config import durations as durations_lib
from vit_dist.config.binding import bind
from vit_dist.data.damage import Damage
from vit_dist.data.mixing import Mixing, check_groups, make_mixing
from vit_dist.data.ops.pipe import Pipe, output_spec, parse
from vit_dist.data.sources.source import Source
from vit_dist.model.posemb import METHODS
from vit_dist.model.variants import PRECISIONS, vit_config
from vit_dist.model.vit import build_vit, weight_shapes
from vit_dist.model.weights import PATCH_METHODS
from vit_dist.run.sources import check_input, open_sources
from vit_dist.training.losses import make_loss
from vit_dist.training.multipliers import check_names
from vit_dist.training.optimizer import check_optimizer, make_optimizer
from vit_dist.training.schedules import make_schedule
from vit_dist.training.sharding import NOT_ON_TPUS
from vit_dist.training.step import check_step

MAX_SEED = 2**31 - 1  # the step's dropout seeds are int32
_BUILD_KEYS = ("head_bias", "posemb_stddev")  # of config.model, for build_vit; the rest: vit_config


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked config: keyword arguments for every part, and durations in steps."""

    config: ConfigDict
    sources: dict[str, Source]  # split -> source; "train" always, "val" and "test" where named
    damage: dict[str, Damage]  # the same keys where damaged examples are masked, else empty
    train_pipe: Pipe
    eval_pipe: Pipe
    model: dict[str, Any]
    build: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    loss: dict[str, Any]
    step: dict[str, Any]
    mixing: Mixing | None
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
    strategy = bind(make_strategy, config.strategy, name="strategy")
    check_strategy(**strategy)
    optimizer = _check_optimizer(config)
    loss = bind(make_loss, config.loss, name="loss")
    make_loss(**loss)
    size = config_lib.parse_image_size(config.image_size)
    _check_ranges(config)
    check_input(config)
    step = bind(
        check_step,
        config.step,
        name="step",
        batch_size=config.input.batch_size,
        num_replicas=max(config.strategy.virtual_cpus, 1),
        shard_state=optimizer["shard_state"],
    )
    mixing = make_mixing(**bind(make_mixing, config.mixing, name="mixing"))
    check_parts(step, mixing, num_replicas=step["num_replicas"])
    _durations(config, num_examples=1)  # a mistake there shows before a data set is prepared
    sources = open_sources(config)
    num_classes = sources["train"].num_classes
    model, build = _check_model(config, size, num_classes)
    patterns = {k: optimizer[k] for k in ("decay_multipliers", "lr_multipliers")}
    if patterns != {k: config_lib.get_defaults().optimizer[k] for k in patterns}:  # takes a second
        check_names(weight_shapes(build["config"]), **patterns)
    pipes = {
        "train": parse(config.input.train_ops, size=size, num_classes=num_classes),
        "eval": parse(config.input.eval_ops, size=size, num_classes=num_classes),
    }
    _check_images(sources, pipes, (*size, model["channels"]))
    durations = _durations(config, sources["train"].num_examples)
    schedule = _bind_schedule(config, durations["total"], sources["train"].num_examples)
    make_schedule(**schedule)
    masked = config.input.on_bad_example == "mask"
    return Run(
        config=config,
        sources=sources,
        damage={k: Damage(v) for k, v in sources.items()} if masked else {},
        train_pipe=pipes["train"],
        eval_pipe=pipes["eval"],
        model=model,
        build=build,
        optimizer=optimizer,
        schedule=schedule,
        loss=loss,
        step=step,
        mixing=mixing,
        strategy=strategy,
        total_steps=durations["total"],
        log_steps=max(durations["log"], 1),
        eval_steps=durations["eval"],
        save_steps=durations["save"],
    )


def _check_optimizer(config: ConfigDict) -> dict[str, Any]:
    later: dict[str, Any] = {"variables": {}, "strategy": None, "num_heads": None}
    optimizer = bind(make_optimizer, config.optimizer, name="optimizer", **later)
    optimizer = {key: value for key, value in optimizer.items() if key not in later}
    check_optimizer(**optimizer)
    if optimizer["shard_state"] and config.strategy.name == "tpu":
        raise ValueError(NOT_ON_TPUS)
    return optimizer


def check_parts(step: Mapping[str, Any], mixing: Mixing | None, *, num_replicas: int) -> None:
    """Checks that the global batch can be cut into replicas and micro-batches."""
    check_step(**{**step, "num_replicas": num_replicas})
    num_parts = num_replicas * step["accumulation"]
    check_groups(mixing, batch_size=step["batch_size"], num_parts=num_parts)


def _check_ranges(config: ConfigDict) -> None:
    if config.keep_checkpoints < 1:
        raise ValueError(
            f"config.keep_checkpoints must be 1 or more, got {config.keep_checkpoints}"
        )
    if not 0 <= config.seed <= MAX_SEED:
        raise ValueError(f"config.seed must be in 0..{MAX_SEED}, got {config.seed}")
    if config.init_image_size is not None:
        config_lib.parse_image_size(config.init_image_size, key="init_image_size")
    try:
        re.compile(config.init_ignore)
    except re.error as error:
        raise ValueError(
            f"config.init_ignore {config.init_ignore!r} is no regex: {error}"
        ) from None
    allowed = {
        "precision": tuple(PRECISIONS),
        "posemb_method": tuple(METHODS),
        "patch_method": PATCH_METHODS,
    }
    for key, names in allowed.items():
        if config[key] not in names:
            raise ValueError(
                f"config.{key} {config[key]!r} is unknown; allowed: {', '.join(names)}"
            )


def _check_model(
    config: ConfigDict, size: tuple[int, int], num_classes: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    section = {k: v for k, v in config.model.items() if k not in _BUILD_KEYS}
    model = bind(vit_config, section, name="model", image_size=size, num_classes=num_classes)
    build = bind(
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
    sources: Mapping[str, Source], pipes: Mapping[str, Pipe], shape: tuple[int, int, int]
) -> None:
    for name, source in sources.items():
        key = "train" if name == "train" else "eval"
        spec = output_spec(source, pipes[key])
        for needed in ("image", "label"):
            if needed not in spec:
                raise ValueError(f"config.input.{key}_ops must keep '{needed}': {pipes[key]}")
        got = tuple(spec["image"].shape)
        if got != shape:
            raise ValueError(
                f"config.input.{key}_ops gives images of {got}, but config.image_size is "
                f"{shape[:2]} and config.model.channels {shape[2]}: end the pipe with resize(size) "
                "or a crop to size"
            )
        if not any(step.op.on_device for step in pipes[key].steps):
            raise ValueError(
                f"config.input.{key}_ops leaves images at 0..255: add value_range(-1, 1), as the "
                "reference's checkpoints take them, or normalize('imagenet')"
            )


def _durations(config: ConfigDict, num_examples: int) -> dict[str, int]:
    known = {"batch_size": config.input.batch_size, "num_examples": num_examples}
    total = durations_lib.duration(config, "total", **known)
    durations = {"total": total}
    for name in ("log", "eval", "save"):
        durations[name] = durations_lib.duration(config, name, **known, total_steps=total)
    return durations


def _bind_schedule(config: ConfigDict, total_steps: int, num_examples: int) -> dict[str, Any]:
    steps = {
        f"{name}_steps": durations_lib.duration(
            config.schedule,
            name,
            batch_size=config.input.batch_size,
            num_examples=num_examples,
            total_steps=total_steps,
            where="config.schedule",
        )
        for name in ("warmup", "cooldown", "timescale", "hold")
    }
    return bind(
        make_schedule,
        durations_lib.without_durations(config.schedule),
        name="schedule",
        learning_rate=config.optimizer.learning_rate,
        total_steps=total_steps,
        **steps,
    )
