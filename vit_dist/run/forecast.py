"""What a run is expected to do on the devices that it has, kept to be held against what it did."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from vit_dist.cluster.hosts import device_kind, device_name, num_hosts
from vit_dist.costs.devices import Device, find_device
from vit_dist.costs.flops import train_flops
from vit_dist.costs.memory import state_of
from vit_dist.costs.targets import Target
from vit_dist.model.vit import named_weights
from vit_dist.monitoring.curves import curve_of
from vit_dist.run.options import RunOptions
from vit_dist.run.planning import Planner, with_choice
from vit_dist.training.state import TrainState

_GIB = 2**30


def forecast(
    options: RunOptions, num_examples: int, state: TrainState, strategy: tf.distribute.Strategy
) -> list[dict[str, Any]]:
    """The figures of a plan that a run measures, too; takes some milliseconds.

    The time is left out for devices that the table lacks, for CPUs, which would have to be measured
    first, and for several hosts of GPUs, whose network nobody tells.

    Args:
      options: of the run.
      num_examples: of an epoch.
      state: its variables.
      strategy: its devices.

    Returns:
      For each figure its name for people, "metric", which measures it in metrics.jsonl, "limit",
      which nothing can beat, or None, and "expected".
    """
    made = state_of(named_weights(state.model), state.optimizer, ema=state.ema is not None)
    planner = Planner(options, num_examples, _target(options, strategy), state=made)
    rows = [_row("memory of a device, GiB", "memory/device_peak", None, planner.need() / _GIB)]
    device, time = planner.target.device, planner.time()
    peak = device.peak(planner.choice.precision)
    if time is None or not peak:
        return rows
    batch = options.input.batch_size
    # Without what `remat` computes again, as MFU is defined.
    useful = planner.share * train_flops(planner.network, trained=set(made.trained)) / peak
    rows += [
        _row("seconds of a step", "train/seconds_per_step", time.floor, time.expected),
        _row(
            "images per second",
            "train/examples_per_second",
            batch / time.floor,
            batch / time.expected,
        ),
        _row("MFU", "speed/mfu", useful / time.floor, useful / time.expected),
    ]
    return rows


def fit_remat(
    options: RunOptions, num_examples: int, strategy: tf.distribute.Strategy
) -> tuple[RunOptions, str]:
    """Decides `model.remat=auto` for the devices of a run.

    The same devices and options give the same policy, so that a resume computes what the run did.

    Args:
      options, num_examples, strategy: see `forecast`.

    Returns:
      The options with a policy, and a line for the user; unchanged and "" without auto.
    """
    if not options.model.auto_remat:
        return options, ""
    planner = Planner(options, num_examples, _target(options, strategy))
    chosen = with_choice(options, planner.choice, batch_size=options.input.batch_size)
    need = f"a step takes an estimated {planner.need() / _GIB:.1f} GiB of a device"
    if planner.available == math.inf:
        need += ", whose memory is not known"
    elif planner.fits:
        need += f", {planner.available / _GIB:.1f} GiB can be used"
    else:
        need += f", and only {planner.available / _GIB:.1f} GiB can be used"
    return chosen, f"model.remat=auto takes {planner.choice.remat}: {need}"


def forecast_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a table in Markdown."""
    lines = ["| figure | limit | expected | measured as |", "| --- | --- | --- | --- |"]
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:.4g}"
        lines.append(
            f"| {row['figure']} | {limit} | {row['expected']:.4g} | {curve_of(row['metric'])} |"
        )
    return "\n".join(lines)


def _row(figure: str, metric: str, limit: float | None, expected: float) -> dict[str, Any]:
    return {"figure": figure, "metric": metric, "limit": limit, "expected": expected}


def _target(options: RunOptions, strategy: tf.distribute.Strategy) -> Target:
    """The machine that a strategy runs on, as far as the table of devices knows it."""
    kind, name = device_kind(strategy), device_name(strategy)
    found = None if kind == "CPU" else find_device(name, options.monitor.devices)
    memory = None
    if kind == "CPU":
        # Replicas of a host share its memory.
        replicas = strategy.num_replicas_in_sync // num_hosts(strategy)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 / replicas
    device = found or Device(name or kind, "", None, None, None, None, memory)
    return Target(name, kind, device, strategy.num_replicas_in_sync, num_hosts(strategy))
