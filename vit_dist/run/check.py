"""From a config to the options of a run, checked before any device starts (law 3)."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from vit_dist.cluster.strategy import check_strategy, make_strategy
from vit_dist.config import defaults as config_lib
from vit_dist.config import durations as durations_lib
from vit_dist.config.binding import bind
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.config.imports import check_imports, import_modules
from vit_dist.costs.devices import DEVICES, read_devices
from vit_dist.data.damage import Damage
from vit_dist.data.mixing import Mixing, check_groups, make_mixing
from vit_dist.data.ops.pipe import Pipe, parse
from vit_dist.data.pipeline import check_pipe
from vit_dist.data.service import parse_addresses
from vit_dist.data.sources.source import Source
from vit_dist.evaluators.classification import metric_names
from vit_dist.inspection.draw import check_matplotlib
from vit_dist.model.memory import POLICIES
from vit_dist.model.posemb import METHODS
from vit_dist.model.variants import PRECISIONS, check_choice, vit_config
from vit_dist.model.vit import build_vit, weight_shapes
from vit_dist.model.weights import PATCH_METHODS
from vit_dist.run.eval_options import check_evals
from vit_dist.run.options import (
    BestOptions,
    Data,
    EvalOptions,
    EvaluationOptions,
    InputOptions,
    ModelOptions,
    MonitorOptions,
    ProfileOptions,
    RunOptions,
    WeightsOptions,
)
from vit_dist.run.sources import check_input, open_sources
from vit_dist.training.losses import check_threshold, make_loss
from vit_dist.training.multipliers import check_names
from vit_dist.training.optimizer import OptimizerOptions
from vit_dist.training.schedules import Schedule
from vit_dist.training.sharding import NOT_ON_TPUS
from vit_dist.training.step import StepOptions, check_batch
from vit_dist.training.watch import WatchOptions

# Keys of config.model that are arguments of build_vit; all others are arguments of vit_config.
_BUILD_KEYS = ("head_bias", "posemb_stddev")


def check(config: ConfigDict) -> tuple[RunOptions, Data]:
    """Checks every key of a config and the data it names; touches no device.

    Raises:
      ConfigError: the first mistake found; says what was given, what is allowed, what to do.
      DataError: the data is not there, or not what the config says.
    """
    config = _finalized(config)
    import_modules(check_imports(config.imports))
    # What can be checked without the data comes first: opening it can take minutes.
    optimizer = _check_optimizer(config)
    step = StepOptions(**bind(StepOptions, config.step, name="step"))
    mixing = make_mixing(**bind(make_mixing, config.mixing, name="mixing"))
    # The number of replicas is known only once devices are started, unless virtual CPUs fix it; the
    # command checks again then.
    check_parts(
        config.input.batch_size,
        step,
        mixing,
        num_replicas=max(config.strategy.virtual_cpus, 1),
        shard_state=optimizer.shard_state,
    )
    _check_choices(config)
    if key := _figures_key(config):
        check_matplotlib(f"config.{key}={config[key]}")
    loss = make_loss(**bind(make_loss, config.loss, name="loss"))
    # With a made-up number of examples: this finds durations that are missing or negative, minutes
    # before a data set has been downloaded and counted. The real number follows below.
    _durations(config, num_examples=1)
    evaluation, data = _check_evaluation(config, training=True)
    train = data.sources["train"]
    if train.num_classes < 2:
        raise DataError(
            f"{train} has one class alone ({train.class_names[0]!r}): there is nothing to tell "
            "apart. A folder wants one directory for each class"
        )
    smoothing, threshold = config.loss.label_smoothing, config.loss.threshold
    check_threshold(smoothing, threshold, num_classes=train.num_classes)
    # The rest needs the network, which needs the number of classes, which only the data knows.
    _check_patterns(optimizer, evaluation.model.network)
    pipe = _parse_pipe(config.input.train_ops, evaluation.model.network)
    _check_images([train], pipe, "config.input.train_ops", evaluation.model.network)
    durations = _durations(config, train.num_examples)
    figures_steps = durations["figures"] if _figures_key(config) else 0
    shows = config.monitor.judged_images > 0 or figures_steps > 0
    evaluation = dataclasses.replace(evaluation, verdicts=shows)
    return RunOptions(
        evaluation=evaluation,
        input=InputOptions(
            pipe=pipe,
            batch_size=config.input.batch_size,
            num_threads=config.input.num_threads,
            prefetch=config.input.prefetch,
            repeats=config.input.repeats,
            mixing=mixing,
            services=tuple(parse_addresses(config.input.service)),
            service_timeout=config.input.service_timeout,
        ),
        optimizer=optimizer,
        step=step,
        schedule=_make_schedule(config, durations["total"], train.num_examples),
        loss=loss,
        seed=config.seed,
        total_steps=durations["total"],
        # At least the line of the progress bar moves: 0 means every step here.
        log_steps=max(durations["log"], 1),
        eval_steps=durations["eval"],
        save_steps=durations["save"],
        figures_steps=figures_steps,
        save_minutes=config.save_minutes or 0.0,
        monitor=_check_monitor(config, total_steps=durations["total"]),
        keep_checkpoints=config.keep_checkpoints,
        best=_check_best(
            config,
            evaluation.evals,
            metrics_of_val=metric_names(train.num_classes) if "val" in data.sources else (),
            eval_steps=durations["eval"],
        ),
        resume_from=config.resume_from,
        init_from=config.init_from,
        record=config_lib.as_json(config),
    ), data


def check_evaluation(
    config: ConfigDict,
    *,
    splits: Sequence[str] | None = None,
    evals: Sequence[str] | None = (),
) -> tuple[EvaluationOptions, Data]:
    """Checks the part of a config that an evaluation uses, and opens the splits to evaluate on.

    Args:
      config: its training split need not exist; optimizer and schedule are not checked.
      splits: some of "train", "val", "test"; None for val and test, those that are configured.
      evals: some of the names in config.evals; None for all.

    Raises:
      ConfigError: a mistake in that part, or a split that is not configured.
      DataError: the data is not there, or not what the config says.
    """
    config = _finalized(config)
    import_modules(check_imports(config.imports))
    _check_choices(config)
    return _check_evaluation(config, training=False, splits=splits, evals=evals)


def _finalized(config: ConfigDict) -> FrozenConfigDict:
    """The config as `finalize` returns it."""
    # Frozen: the command line's, which load_config has finalised together with its flags. Others
    # come from a notebook or a test.
    return config if isinstance(config, FrozenConfigDict) else config_lib.finalize(config)


def _check_evaluation(
    config: FrozenConfigDict,
    *,
    training: bool,
    splits: Sequence[str] | None = None,
    evals: Sequence[str] | None = None,
) -> tuple[EvaluationOptions, Data]:
    strategy = bind(make_strategy, config.strategy, name="strategy")
    check_strategy(**strategy)
    size = config_lib.parse_image_size(config.image_size)
    check_input(config)
    # The model's head needs the number of classes, which only the data knows.
    # Evaluations on features need none of the run's own splits: `splits` may be empty beside them.
    wanted = config.evals and (evals is None or len(evals) > 0)
    alone = wanted and splits is not None and not splits
    opened = {} if alone else open_sources(config, training=training, splits=splits)
    named, sources = check_evals(config, opened, training=training, names=evals)
    num_classes = next(iter(sources.values())).num_classes
    model = _check_model(config, size, num_classes)
    pipe = _parse_pipe(config.input.eval_ops, model.network)
    # "train" has a pipe of its own; evaluate may judge it like any other split.
    judged = [source for name, source in opened.items() if not (training and name == "train")]
    _check_images(judged, pipe, "config.input.eval_ops", model.network)
    for entry in named.values():
        _check_size(entry, size, model.network)
        read = [sources[key] for key in (entry.split, entry.train) if key]
        at = {**model.network, "image_size": entry.image_size}
        size_key = "config.image_size" if entry.image_size == size else _size_key(entry)
        _check_images(read, entry.pipe, entry.where, at, size_key=size_key)
    masked = config.input.on_bad_example == "mask"
    options = EvaluationOptions(
        model=model,
        strategy=strategy,
        pipe=pipe,
        batch_size=config.input.eval_batch_size,
        num_threads=config.input.num_threads,
        # Without label smoothing, reduction and threshold: the loss of an evaluation tells how sure
        # the model is of the true labels.
        loss=make_loss(name=config.loss.name),
        labels_sum_to_one=config.loss.name != "sigmoid",
        jit=config.step.jit,
        weights=WeightsOptions(
            posemb_method=config.posemb_method,
            patch_method=config.patch_method,
            ignore=config.init_ignore,
            image_size=config.init_image_size,
        ),
        evals=named,
        imports=check_imports(config.imports),
    )
    limit = config.input.max_bad_share
    damage = {k: Damage(v, max_share=limit) for k, v in sources.items()} if masked else {}
    return options, Data(sources, damage)


def _check_optimizer(config: FrozenConfigDict) -> OptimizerOptions:
    optimizer = OptimizerOptions(**bind(OptimizerOptions, config.optimizer, name="optimizer"))
    if optimizer.shard_state and config.strategy.name == "tpu":
        raise ConfigError(NOT_ON_TPUS)
    return optimizer


def _check_monitor(config: FrozenConfigDict, *, total_steps: int) -> MonitorOptions:
    """What a run shows of itself.

    Raises:
      ConfigError: a profile beyond the end of the run, or a mistake in the file of devices.
    """
    profile = ProfileOptions(**bind(ProfileOptions, config.profile, name="profile"))
    start, count = profile.start_step, profile.num_steps
    if start is not None and start + count > total_steps:
        raise ConfigError(
            f"config.profile asks for steps {start}..{start + count - 1}, and the run has "
            f"{total_steps}, counted from 0: lower config.profile.start_step or num_steps"
        )
    return _monitor(**bind(_monitor, config.monitor, name="monitor"), profile=profile)


def _monitor(
    *,
    device_file: str,
    update_norm: bool,
    watch_steps: int,
    histograms: bool,
    batch_images: int,
    judged_images: int,
    profile: ProfileOptions | None = None,
) -> MonitorOptions:
    """The options of config.monitor."""
    return MonitorOptions(
        devices=read_devices(device_file) if device_file else DEVICES,
        watch=WatchOptions(every=watch_steps, histograms=histograms, update_norm=update_norm),
        profile=profile or ProfileOptions(),
        batch_images=batch_images,
        judged_images=judged_images,
    )


def check_parts(
    batch_size: int,
    step: StepOptions,
    mixing: Mixing | None,
    *,
    num_replicas: int,
    shard_state: bool = False,
) -> None:
    """Checks that the global batch can be cut into replicas and micro-batches.

    Examples that mixup or CutMix pair have to come into the same micro-batch.

    Raises:
      ConfigError: it cannot.
    """
    check_batch(batch_size, step, num_replicas=num_replicas, shard_state=shard_state)
    check_groups(mixing, batch_size=batch_size, num_parts=num_replicas * step.accumulation)


def _check_choices(config: FrozenConfigDict) -> None:
    if config.init_image_size is not None:
        config_lib.parse_image_size(config.init_image_size, key="init_image_size")
    try:
        re.compile(config.init_ignore)
    except re.error as error:
        raise ConfigError(
            f"config.init_ignore {config.init_ignore!r} is no regex: {error}"
        ) from None
    allowed = {
        "precision": tuple(PRECISIONS),
        "posemb_method": tuple(METHODS),
        "patch_method": PATCH_METHODS,
    }
    for key, names in allowed.items():
        if config[key] not in names:
            raise ConfigError(
                f"config.{key} {config[key]!r} is unknown; allowed: {', '.join(names)}"
            )
    if config.strategy.deterministic and config.step.jit == "off":
        raise ConfigError(
            "config.strategy.deterministic acts on what XLA compiles, and config.step.jit=off "
            "compiles nothing: set config.step.jit=auto, or config.strategy.deterministic=False"
        )


def _figures_key(config: FrozenConfigDict) -> str:
    """The key that asks for figures while training; "" if none does."""
    keys = [k for k in config if k.startswith("figures_") and config[k]]
    # finalize() keeps one unit of a duration.
    return keys[0] if keys else ""


def _check_best(
    config: FrozenConfigDict,
    evals: Mapping[str, EvalOptions],
    *,
    metrics_of_val: Sequence[str],
    eval_steps: int,
) -> BestOptions | None:
    if config.keep_best is None:
        if config.patience is not None:
            raise ConfigError(
                "config.patience waits for a better value of config.keep_best: set that, too, for "
                "example to 'max val/accuracy'"
            )
        return None
    names = [*(["val"] if metrics_of_val else []), *evals]
    mode, name, metric = parse_choice(config.keep_best, names, key="config.keep_best")
    metrics = metrics_of_val if name == "val" else evals[name].metrics
    check_metric(name, metric, metrics, key="config.keep_best")
    if config.patience and not (eval_steps if name == "val" else evals[name].every):
        key = "eval_steps" if name == "val" else f"evals.{name}.every"
        raise ConfigError(
            f"config.patience waits for a better value of config.keep_best, and {name} is judged "
            f"at the end of the run alone: set config.{key} to a number of steps"
        )
    return BestOptions(metric=f"{name}/{metric}", mode=mode, patience=config.patience or 0)


def parse_choice(text: str, names: Sequence[str], *, key: str) -> tuple[str, str, str]:
    """("max" or "min", NAME, METRIC) of "max NAME/METRIC", by which checkpoints are chosen.

    Args:
      text: what the user gave.
      names: of what is judged.
      key: what messages call it.

    Raises:
      ConfigError: it has another form, or another NAME.
    """
    found = re.fullmatch(r"(max|min) (\w+)/(.+)", text)
    if found is None or found[2] not in names:
        raise ConfigError(
            f"{key} {text!r} must be 'max NAME/METRIC' or 'min NAME/METRIC' with a NAME of what is "
            f"judged: {', '.join(names) or 'nothing'}"
        )
    return found[1], found[2], found[3]


def check_metric(name: str, metric: str, metrics: Sequence[str] | None, *, key: str) -> None:
    """Raises ConfigError where what is judged has no such metric.

    Args:
      name, metric, key: see parse_choice.
      metrics: those that there are. A kind of the user's may not tell, None: then they are known
        once it has judged, see Best.is_better.
    """
    if metrics is not None and metric not in metrics:
        shown = [f"{name}/{known}" for known in metrics[:20]] + ["..."] * (len(metrics) > 20)
        raise ConfigError(f"{key} '{name}/{metric}' is unknown; there are {', '.join(shown)}")


def _check_model(config: FrozenConfigDict, size: tuple[int, int], num_classes: int) -> ModelOptions:
    # bind() names unknown keys, with a guess at what was meant; vit_config checks the values.
    section = {k: v for k, v in config.model.items() if k not in _BUILD_KEYS}
    # A policy waits for the devices: until they are known nothing is computed again.
    auto = section["remat"] == "auto"
    if auto:
        section["remat"] = "none"
    check_choice("remat", section["remat"], (*POLICIES, "auto"))
    network = vit_config(
        **bind(vit_config, section, name="model", image_size=size, num_classes=num_classes)
    )
    build = {k: v for k, v in config.model.items() if k in _BUILD_KEYS}
    bind(build_vit, build, name="model", config=network)
    if network["pool"] == "none":
        raise ConfigError("config.model.pool 'none' gives one output per token; not for training")
    return ModelOptions(
        network=network,
        precision=config.precision,
        seed=config.seed,
        auto_remat=auto,
        **build,
    )


def _check_patterns(optimizer: OptimizerOptions, network: Mapping[str, Any]) -> None:
    """Raises ConfigError where a pattern of the config matches no weight of the model."""
    patterns = {
        "decay_multipliers": optimizer.decay_multipliers,
        "lr_multipliers": optimizer.lr_multipliers,
    }
    # Listing the model's weights takes a second, and the default patterns fit every model.
    defaults = {field.name: field.default for field in dataclasses.fields(OptimizerOptions)}
    if any(tuple(rules) != defaults[key] for key, rules in patterns.items()):
        check_names(weight_shapes(dict(network)), **patterns)


def _parse_pipe(text: str, network: Mapping[str, Any]) -> Pipe:
    return parse(text, size=network["image_size"], num_classes=network["num_classes"])


def _size_key(entry: EvalOptions) -> str:
    return f"config.evals.{entry.name}.image_size"


def _check_size(entry: EvalOptions, size: tuple[int, int], network: Mapping[str, Any]) -> None:
    """Raises ConfigError where the network cannot be judged at an evaluation's own resolution."""
    patch = network["patch_size"]
    if entry.image_size != size and any(n % patch for n in entry.image_size):
        raise ConfigError(
            f"{_size_key(entry)} is {entry.image_size}, which cannot be cut into patches of "
            f"{patch}x{patch}: set it to a multiple of {patch}"
        )


def _check_images(
    sources: Sequence[Source],
    pipe: Pipe,
    key: str,
    network: Mapping[str, Any],
    *,
    size_key: str = "config.image_size",
) -> None:
    """What the pipe makes of each source must be what the model takes."""
    shape = (*network["image_size"], network["channels"])
    check_crop(pipe, key)
    for source in sources:
        spec = check_pipe(source, pipe)
        for needed in ("image", "label"):
            if needed not in spec:
                raise ConfigError(f"{key} must keep '{needed}': {pipe}")
        got = tuple(spec["image"].shape)
        if got != shape:
            raise ConfigError(
                f"{key} gives images of {got}, but {size_key} is "
                f"{shape[:2]} and config.model.channels {shape[2]}: end the pipe with resize(size) "
                "or a crop to size"
            )
        # Images travel as uint8 (law 5); only an op on the device makes floats of a known range.
        if not any(step.op.on_device for step in pipe.steps):
            raise ConfigError(
                f"{key} leaves images at 0..255: add value_range(-1, 1), as the "
                "reference's checkpoints take them, or normalize('imagenet')"
            )


def check_crop(pipe: Pipe, key: str, *, remedy: str = "raise the number in resize_small") -> None:
    """Raises ConfigError where a crop is larger than the side to which the pipe resizes before."""
    side = None
    for step in pipe.steps:
        if step.op.name in ("resize", "resize_small"):
            side = step.arguments.get("smaller_size")
        elif step.op.name in ("central_crop", "random_crop") and side is not None:
            size = step.arguments["size"]
            if max(size if isinstance(size, tuple) else (size,)) > side:
                raise ConfigError(
                    f"{key}: {step} cannot cut {size} out of images whose smaller side has {side} "
                    f"pixels: {remedy}"
                )


def _durations(config: FrozenConfigDict, num_examples: int) -> dict[str, int]:
    """Steps of "total", "log", "eval", "save" and "figures"."""
    known = {"batch_size": config.input.batch_size, "num_examples": num_examples}
    total = durations_lib.duration(config, "total", **known)
    # num_examples is 1 in the first look, which does not know how many there are.
    if total < 1 and num_examples > 1:
        given = [
            f"{k}={config[k]}" for k in config if k.startswith("total_") and config[k] is not None
        ]
        raise ConfigError(
            f"nothing would be trained: config.{given[0]} is {total} steps of "
            f"{config.input.batch_size} examples; train longer, or lower config.input.batch_size. "
            "To judge weights as they are: python -m vit_dist.evaluate"
        )
    durations = {"total": total}
    for name in ("log", "eval", "save", "figures"):
        durations[name] = durations_lib.duration(config, name, **known, total_steps=total)
    return durations


def _make_schedule(config: FrozenConfigDict, total_steps: int, num_examples: int) -> Schedule:
    # The config gives durations in a unit of the user's choice, Schedule takes steps.
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
    arguments = bind(
        Schedule,
        durations_lib.without_durations(config.schedule),
        name="schedule",
        learning_rate=config.optimizer.learning_rate,
        total_steps=total_steps,
        **steps,
    )
    return Schedule(**arguments)
