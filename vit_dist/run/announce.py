"""What a run shows and records before its first step."""

import json
from collections.abc import Callable

import tensorflow as tf

from vit_dist.cluster.hosts import describe, device_kind, is_chief, num_hosts
from vit_dist.cluster.strategy import device_warnings
from vit_dist.monitoring import hparams
from vit_dist.monitoring.history import PLAN_FILE
from vit_dist.monitoring.log import detail
from vit_dist.monitoring.writer import Writer
from vit_dist.paths import expand
from vit_dist.run.advice import average_warnings, data_warnings, pixel_warnings
from vit_dist.run.forecast import forecast, forecast_text
from vit_dist.run.notices import notices
from vit_dist.run.options import Data, RunOptions
from vit_dist.run.texts import changes_text, config_text, model_text, run_text
from vit_dist.storage.files import write_whole
from vit_dist.training.state import TrainState
from vit_dist.training.step import jit_warnings


def announce(
    options: RunOptions,
    data: Data,
    strategy: tf.distribute.Strategy,
    state: TrainState,
    workdir: str,
    origin: str,
    writer: Writer,
    note: Callable[..., None],
) -> None:
    """Shows and records what the run begins with: config, devices, model, data."""
    text = json.dumps(options.record, indent=2, sort_keys=True)
    first, chief = int(state.step.numpy()), is_chief(strategy)
    if chief:
        write_whole(expand(workdir) / "config.json", text.encode())
        devices = {"replicas": strategy.num_replicas_in_sync, "hosts": num_hosts(strategy)}
        record = options.record
        writer.summary(first, lambda: hparams.session_start(record, devices=devices))
        writer.text(first, "run", run_text(options, strategy))
        writer.text(first, "config", config_text(record))
        writer.text(first, "config_changes", changes_text(record))
        writer.text(first, "model", model_text(state.model, options.model.network))
        planned = forecast(options, data.sources["train"].num_examples, state, strategy)
        write_whole(expand(workdir) / PLAN_FILE, json.dumps(planned, indent=2).encode())
        writer.text(first, "plan", forecast_text(planned))
        writer.text(first, "weights", f"```\n{origin}\n```")
    detail("config: %s", text)
    detail("TensorFlow %s said while it started:\n%s", tf.__version__, notices().rstrip() or "-")
    source = data.sources["train"]
    batch_size, accumulation = options.input.batch_size, options.step.accumulation
    note(describe(strategy, batch_size=batch_size, accumulation=accumulation))
    height, width = options.image_size
    note(
        f"model {options.record['model']['variant']} at {height}x{width}: "
        f"{state.model.count_params():,} parameters"
    )
    note(
        f"{source.num_examples:,} training examples in {source.num_classes} classes; "
        f"{options.total_steps:,} steps"
    )
    for split, opened in data.sources.items():
        if opened.prepared is not None:
            note(f"{split} was resized beforehand: {opened.prepared}")
    warnings = device_warnings(strategy)
    warnings += jit_warnings(
        options.step.jit,
        kind=device_kind(strategy),
        num_replicas=strategy.num_replicas_in_sync,
    )
    if chief:
        pipes = {"train_pipe": options.input.pipe, "eval_pipe": options.evaluation.pipe}
        warnings += data_warnings(data.splits, options.image_size)
        warnings += pixel_warnings(data.sources, **pipes)
    # With a warm-up nothing is left of the initial weights.
    decay = None if options.step.ema_warmup else options.step.ema_decay
    for line in [*warnings, *average_warnings(decay, options.total_steps)]:
        note(f"warning: {line}")
    for line in origin.splitlines():
        note(line)
    note(f"TensorBoard: tensorboard --logdir {workdir}")
