"""Peak memory of a step: what replicas, remat, micro-batches and blockwise attention save.

    .venv/bin/python benchmarks/memory.py [--variant S/16] [--batch_size 32] [--image_size 224]

Each setting runs in a process of its own (Linux), on one CPU device, compiled by XLA. Measured are
the peak of resident memory during two steps, less what the process held before the first step
(weights, optimizer state), and the CPU time of these steps. Beside it stands what `python -m
vit_dist.plan` says of the same step. "long" settings have many tokens: a small batch at --long_size
pixels.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _smoke
from _machine import Machine
from _process import memory

from vit_dist.costs.memory import count_state, step_memory
from vit_dist.model.variants import vit_config
from vit_dist.training.optimizer import OptimizerOptions

OPTIMIZER = OptimizerOptions(weight_decay=0.1)
SMOKE = {
    "variant": "mu/16",
    "depth": 1,
    "batch_size": 4,
    "image_size": 32,
    "only": ["plain", "4 micro-batches"],
}


def settings(batch: int, size: int, long_batch: int, long_size: int) -> list[dict]:
    """The settings that are compared; a name says how its setting differs from the plain one."""
    plain = {"batch_size": batch, "image_size": size}
    long = {"batch_size": long_batch, "image_size": long_size}
    return [
        {"name": "plain", **plain},
        {"name": "one of two replicas", **plain, "batch_size": batch // 2},
        {"name": "remat attention", **plain, "remat": "attention"},
        {"name": "remat full", **plain, "remat": "full"},
        {"name": "4 micro-batches", **plain, "accumulation": 4},
        {"name": "8 micro-batches", **plain, "accumulation": 8},
        {"name": "remat full, 4 micro-batches", **plain, "remat": "full", "accumulation": 4},
        {"name": "long plain", **long},
        {"name": "long remat attention", **long, "remat": "attention"},
        {"name": "long remat full", **long, "remat": "full"},
        {"name": "long blocks of 256", **long, "attention_block": 256},
        {"name": "long blocks of 256, remat full", **long, "attention_block": 256, "remat": "full"},
    ]


def network_of(variant: str, depth: int | None, setting: dict) -> dict:
    """The arguments of the setting's ViT."""
    options = {k: setting[k] for k in ("remat", "attention_block") if k in setting}
    sizes = {"image_size": setting["image_size"], "depth": depth, "num_classes": 1000}
    return vit_config(variant, **sizes, **options)


def plan(variant: str, depth: int | None, setting: dict) -> int:
    """Bytes that a step is said to need beside weights and optimizer state."""
    network = network_of(variant, depth, setting)
    found = step_memory(
        network,
        count_state(network, OPTIMIZER, ema=False),
        batch_size=setting["batch_size"],
        precision="float32",
        accumulation=setting.get("accumulation", 1),
        kind="CPU",
    )
    return found.total - found.weights - found.optimizer


def measure(variant: str, depth: int | None, setting: dict) -> dict[str, float]:
    """Measures one setting, in a fresh process: peak bytes of a step, and CPU seconds per step."""
    import numpy as np
    import tensorflow as tf

    from vit_dist.cluster.strategy import make_strategy
    from vit_dist.model.vit import build_vit, named_weights
    from vit_dist.training.losses import make_loss
    from vit_dist.training.optimizer import make_optimizer
    from vit_dist.training.schedules import Schedule
    from vit_dist.training.state import TrainState
    from vit_dist.training.step import StepOptions, make_train_step

    strategy, size = make_strategy(name="single"), setting["image_size"]
    with strategy.scope():
        model = build_vit(network_of(variant, depth, setting))
        state = TrainState(model, make_optimizer(named_weights(model), OPTIMIZER))
    train_steps = make_train_step(
        state,
        make_loss(),
        strategy=strategy,
        schedule=Schedule(1e-3, total_steps=10**6),
        preprocess=lambda images: tf.cast(images, tf.float32) / 127.5 - 1,
        batch_size=setting["batch_size"],
        seed=0,
        options=StepOptions(accumulation=setting.get("accumulation", 1)),
    )
    shape = (setting["batch_size"], size, size, 3)
    batch = {"image": np.zeros(shape, np.uint8), "label": np.zeros(shape[:1], np.int32)}
    batches = iter(tf.data.Dataset.from_tensors(batch).cache().repeat())
    one, before = tf.constant(1, tf.int64), memory("VmRSS")
    # `before` is taken ahead of this first call, which compiles: XLA's buffers stay resident
    # between steps, and belong to what a step needs.
    train_steps(batches, one)["loss"].numpy()
    # What the compiler has freed goes back to the system ...
    ctypes.CDLL(None).malloc_trim(0)
    # ... and 5 resets VmHWM (proc(5)), so that the peak is that of the steps to come.
    Path("/proc/self/clear_refs").write_text("5")
    began = time.process_time()
    for _ in range(2):
        train_steps(batches, one)["loss"].numpy()
    seconds = (time.process_time() - began) / 2
    return {"bytes": memory("VmHWM") - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="S/16")
    parser.add_argument("--depth", type=int, help="number of blocks")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--long_batch", type=int, default=2)
    parser.add_argument("--long_size", type=int, default=768)
    parser.add_argument("--only", nargs="+", help="names of settings, as they are printed")
    parser.add_argument("--one", help="measure this setting only (JSON), in this process")
    args = _smoke.parse(parser, SMOKE)
    if args.one:
        print(json.dumps(measure(args.variant, args.depth, json.loads(args.one))), flush=True)
        return
    base: dict[str, float] = {}
    machine = Machine(smoke=args.smoke, record=args.record)
    compared = settings(args.batch_size, args.image_size, args.long_batch, args.long_size)
    for setting in compared:
        if args.only and setting["name"] not in args.only:
            continue
        command = [sys.executable, __file__, "--variant", args.variant]
        command += ["--depth", str(args.depth)] if args.depth else []
        done = subprocess.run(
            [*command, "--one", json.dumps(setting)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{setting} ended with code {done.returncode}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        # Percentages refer to the last plain setting: the first, or "long plain".
        if "plain" in setting["name"] or not base:
            base = found
        planned = plan(args.variant, args.depth, setting)
        machine.conclude(
            f"{args.variant} at {setting['image_size']}, batch {setting['batch_size']}, "
            f"{setting['name']}: {found['bytes'] / 2**20:,.0f} MiB "
            f"({found['bytes'] / base['bytes']:.0%}), {found['seconds']:.2f} CPU s a step "
            f"({found['seconds'] / base['seconds']:.0%}); plan {planned / 2**20:,.0f} MiB, "
            f"{planned / found['bytes']:.2f} of it"
        )


if __name__ == "__main__":
    main()
