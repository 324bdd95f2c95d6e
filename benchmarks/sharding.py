"""What optimizer.shard_state saves and costs: memory of a process, CPU time of a step.

    .venv/bin/python benchmarks/sharding.py [--variant S/16] [--image_size 64] [--batch_size 16]

Two replicas with AdamW, as two virtual CPUs of one process and as two worker processes. Each
setting runs in processes of its own, with and without sharding in turn. "held": MiB that a process
holds between two steps; "peak": the most it ever held; both less what it held before the model was
made. "cpu": its CPU seconds per step. By default without XLA, whose compiler takes more memory than
what is measured.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import _smoke
from _machine import Machine
from _process import free_ports, memory

ROOT = Path(__file__).resolve().parents[1]
SMOKE = {
    "variant": "mu/16",
    "depth": 1,
    "image_size": 32,
    "steps": 1,
    "rounds": 1,
    "kind": ["workers"],
}


def megabytes(key: str) -> float:
    """MiB of memory ("VmRSS" or "VmHWM") after free memory has been given back to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return memory(key) / 2**20


def measure(args: argparse.Namespace, kind: str, shard: bool) -> dict[str, float]:
    """Measures one of the settings, in a fresh process."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import tensorflow as tf

    from vit_dist.cluster.strategy import make_strategy
    from vit_dist.model.variants import vit_config
    from vit_dist.model.vit import build_vit, named_weights
    from vit_dist.training.losses import make_loss
    from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
    from vit_dist.training.schedules import Schedule
    from vit_dist.training.state import TrainState
    from vit_dist.training.step import StepOptions, make_train_step

    if kind == "mirrored":
        strategy = make_strategy(name="mirrored", virtual_cpus=2)
    else:
        strategy = make_strategy(name="multiworker")
    before = megabytes("VmRSS")
    sizes = {"image_size": args.image_size, "depth": args.depth, "num_classes": 1000}
    config = vit_config(args.variant, **sizes)
    # A whole optimizer is made under the scope, a sharded one outside of it: see make_optimizer.
    with strategy.scope():
        model = build_vit(config)
        whole = (
            None
            if shard
            else make_optimizer(named_weights(model), OptimizerOptions(weight_decay=0.1))
        )
    rule = whole or make_optimizer(
        named_weights(model),
        OptimizerOptions(weight_decay=0.1, shard_state=True),
        strategy=strategy,
    )
    with strategy.scope():
        state = TrainState(model, rule)
    step = make_train_step(
        state, make_loss(), strategy=strategy, schedule=Schedule(1e-3, total_steps=100),
        preprocess=lambda x: tf.cast(x, tf.float32) / 127.5 - 1, batch_size=args.batch_size,
        seed=0, options=StepOptions(jit=args.jit),
    )  # fmt: skip
    share = args.batch_size // 2
    images = np.random.default_rng(0).integers(0, 256, (share, *[args.image_size] * 2, 3))
    batch = {"image": images.astype(np.uint8), "label": np.arange(share, dtype=np.int32)}
    data = tf.data.Dataset.from_tensors(batch).repeat()
    batches = iter(strategy.distribute_datasets_from_function(lambda _: data))
    # Two steps that are not counted: the first one traces, the second fills allocators.
    float(step(batches, tf.constant(2))["loss"])
    cpu, wall = sum(os.times()[:2]), time.monotonic()
    loss = float(step(batches, tf.constant(args.steps))["loss"])
    return {
        "held": megabytes("VmRSS") - before,
        "peak": megabytes("VmHWM") - before,
        "cpu": (sum(os.times()[:2]) - cpu) / args.steps,
        "wall": (time.monotonic() - wall) / args.steps,
        "loss": loss,
    }


def start(args: argparse.Namespace, kind: str, shard: bool) -> list[dict[str, float]]:
    """Starts the processes of a setting; returns what each of them measured."""
    count = 1 if kind == "mirrored" else 2
    workers = [f"localhost:{port}" for port in free_ports(count)]
    started = []
    for index in range(count):
        env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
        if kind == "workers":
            task = {"type": "worker", "index": index}
            env["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
        command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{kind},{int(shard)}"]
        started.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="S/16")
    parser.add_argument("--depth", type=int, help="number of blocks")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jit", default="off", choices=("off", "split"))
    parser.add_argument("--kind", choices=("mirrored", "workers"), action="append")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = _smoke.parse(parser, SMOKE)
    if args.one:
        kind, shard = args.one.split(",")
        print(json.dumps(measure(args, kind, shard == "1")))
        return
    for kind in args.kind or ("mirrored", "workers"):
        machine = Machine(smoke=args.smoke, record=args.record)
        ratios = []
        for _ in range(args.rounds):
            pair = [start(args, kind, shard) for shard in (False, True)]
            totals = [sum(p["cpu"] for p in processes) for processes in pair]
            ratios.append(totals[1] / totals[0])
            for name, processes in zip(("whole  ", "sharded"), pair, strict=True):
                shown = [{k: round(v, 3) for k, v in p.items()} for p in processes]
                print(kind, name, *shown, flush=True)
        ratios.sort()
        machine.conclude(
            f"{args.variant} at {args.image_size}, batch {args.batch_size}, {kind}: CPU time of a "
            f"step, sharded over whole, {ratios[len(ratios) // 2]:.2f} (rounds {ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}, n={args.rounds})",
            ratios,
        )


if __name__ == "__main__":
    main()
