"""What TensorBoard's text tab tells of a run, in Markdown: how it was started, and with what."""

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from vit_dist.cluster.hosts import describe, device_name
from vit_dist.config.defaults import as_json, changes, get_defaults
from vit_dist.costs.flops import layer_flops
from vit_dist.model.vit import named_weights
from vit_dist.run.facts import code_facts
from vit_dist.run.options import RunOptions


def run_text(options: RunOptions, strategy: tf.distribute.Strategy) -> str:
    """The command, the versions of the software, and the devices."""
    devices = describe(
        strategy, batch_size=options.input.batch_size, accumulation=options.step.accumulation
    )
    facts = {"Python": platform.python_version(), **code_facts()}
    rows = [("command", f"`{shlex.join(sys.argv)}`"), ("devices", devices)]
    rows += [("device", device_name(strategy) or "unknown"), ("host", platform.node())]
    rows += [(name, value) for name, value in facts.items()]
    return _table(("", ""), rows)


def changes_text(record: Mapping[str, Any]) -> str:
    """The keys of the config that differ from the defaults."""
    found = changes(as_json(get_defaults()), dict(record))
    rows = []
    for change in found:
        key, _, values = change.partition(": ")
        before, _, after = values.partition(" -> ")
        rows.append((f"`{key}`", f"`{after}`", f"`{before}`"))
    return _table(("key", "value", "default"), rows) if rows else "all keys have their defaults"


def model_text(model: keras.Model, network: Mapping[str, Any]) -> str:
    """A row for each layer with weights or products: shapes, parameters, FLOPs for one image."""
    flops = {layer.name: layer for layer in layer_flops(network)}
    shapes: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name, variable in named_weights(model).items():
        # "encoderblock_0/mlp/dense_0/kernel" belongs to the layer "encoderblock_0/mlp/dense_0"; a
        # weight of the model itself, such as "cls", is a row of its own.
        layer = name.rpartition("/")[0] or name
        shapes.setdefault(layer, []).append(f"{name.rpartition('/')[2]} {tuple(variable.shape)}")
        sizes[layer] = sizes.get(layer, 0) + variable.shape.num_elements()
    rows: list[tuple[str, ...]] = []
    for layer in [*shapes, *(name for name in flops if name not in shapes)]:
        cost = flops.get(layer)
        forward, backward = (f"{cost.forward:,}", f"{cost.backward:,}") if cost else ("", "")
        text = ", ".join(shapes.get(layer, []))
        rows.append((layer, text, f"{sizes[layer]:,}" if layer in sizes else "", forward, backward))
    total = [sum(x.forward for x in flops.values()), sum(x.backward for x in flops.values())]
    rows.append(("all", "", f"{sum(sizes.values()):,}", *(f"{n:,}" for n in total)))
    head = ("layer", "weights", "parameters", "FLOPs of an image, forward", "backward, all trained")
    return _table(head, rows)


def config_text(record: Mapping[str, Any]) -> str:
    """The whole config."""
    return f"```json\n{json.dumps(record, indent=2, sort_keys=True)}\n```"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    # A bar would begin a cell of the table.
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in lines)
