"""What a step costs whose backbone is frozen: beside the whole step, and the forward pass alone.

    .venv/bin/python benchmarks/frozen.py [--variant S/16] [--batch_size 16] [--rounds 7]

`optimizer.lr_multipliers` = (("head/", 1.0), ("", 0.0)) trains the head alone. Then no backward
pass goes through the backbone, and no optimizer updates it: the step should take the time of the
forward pass, which is the limit. All run in one process, compiled by XLA, and take turns. The ratio
is that of the forward pass to the frozen step. Goal: at least 0.9.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import _smoke
from _machine import Machine

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from vit_dist.cluster.strategy import make_strategy
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.training.losses import make_loss
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
from vit_dist.training.schedules import Schedule
from vit_dist.training.state import TrainState
from vit_dist.training.step import compiled, make_train_step

SMOKE = {"variant": "mu/16", "image_size": 32, "depth": 1, "batch_size": 2, "rounds": 1}
FROZEN = (("head/", 1.0), ("", 0.0))


def preprocess(images: tf.Tensor) -> tf.Tensor:
    return tf.cast(images, tf.float32) / 127.5 - 1


def make_step(args: argparse.Namespace, multipliers: tuple, batch: dict) -> Callable[[], None]:
    """A function that does args.steps steps and waits for them."""
    strategy = make_strategy(name="single")
    sizes = {"image_size": args.image_size, "depth": args.depth, "num_classes": 1000}
    with strategy.scope():
        model = build_vit(vit_config(args.variant, **sizes))
        options = OptimizerOptions(weight_decay=0.1, lr_multipliers=multipliers)
        state = TrainState(model, make_optimizer(named_weights(model), options))
    train_steps = make_train_step(
        state,
        make_loss(),
        strategy=strategy,
        schedule=Schedule(1e-3, total_steps=10**6, name="constant"),
        preprocess=preprocess,
        batch_size=args.batch_size,
        seed=0,
    )
    batches = iter(tf.data.Dataset.from_tensors(batch).cache().repeat())
    count = tf.constant(args.steps, tf.int64)
    return lambda: train_steps(batches, count)["loss"].numpy()


def make_forward(args: argparse.Namespace, batch: dict) -> Callable[[], None]:
    """A function that does args.steps forward passes and their losses, and waits for them."""
    sizes = {"image_size": args.image_size, "depth": args.depth, "num_classes": 1000}
    model, loss_fn = build_vit(vit_config(args.variant, **sizes)), make_loss()

    @compiled
    def forward(images, labels):
        return tf.reduce_mean(loss_fn(model(preprocess(images), training=True), labels))

    def run() -> None:
        for _ in range(args.steps):
            forward(batch["image"], batch["label"]).numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="S/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--depth", type=int, help="number of blocks")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="steps per round")
    parser.add_argument("--rounds", type=int, default=7)
    args = _smoke.parse(parser, SMOKE)
    machine = Machine(smoke=args.smoke, record=args.record)
    generator = np.random.default_rng(0)
    shape = (args.batch_size, args.image_size, args.image_size, 3)
    batch = {
        "image": tf.constant(generator.integers(0, 256, shape).astype(np.uint8)),
        "label": tf.constant(generator.integers(0, 1000, shape[:1]).astype(np.int32)),
    }
    runs = {
        "whole": make_step(args, (), batch),
        "frozen": make_step(args, FROZEN, batch),
        "forward": make_forward(args, batch),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # traces and compiles, and fills caches
    for _ in range(args.rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) / args.steps)
    median = {name: statistics.median(found) for name, found in times.items()}
    rounds = sorted(a / b for a, b in zip(times["forward"], times["frozen"], strict=True))
    share = median["frozen"] / median["whole"]
    ratio = median["forward"] / median["frozen"]
    machine.conclude(
        f"{args.variant} at {args.image_size}, batch {args.batch_size}: with a frozen backbone "
        f"{1e3 * median['frozen']:.0f} ms a step, {share:.2f} of the whole step's "
        f"{1e3 * median['whole']:.0f} ms; forward pass {1e3 * median['forward']:.0f} ms, ratio "
        f"{ratio:.2f} (rounds {rounds[0]:.2f} to {rounds[-1]:.2f}, n={args.rounds})",
        rounds,
    )


if __name__ == "__main__":
    main()
