"""What the loop adds to the step: the whole loop against the bare step, in one process.

    .venv/bin/python benchmarks/loop_overhead.py [--variant Ti/16] [--steps 10] [--rounds 7]

Bare: train_steps on one batch that is ready in memory. Whole: the loop of `vit_dist.train` with its
input pipeline (digits enlarged to the resolution), metrics, TensorBoard and progress, and a log
line every `steps`. The CPU is both host and device here, so the input's work counts too. Goal: the
whole loop takes at most 2 % more.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import _config
import _smoke
import tensorflow as tf
from _machine import Machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vit_dist.cluster.meeting import meet
from vit_dist.cluster.preemption import Preemption
from vit_dist.cluster.strategy import make_strategy
from vit_dist.cluster.watchdog import Watchdog
from vit_dist.config import finalize
from vit_dist.monitoring.profiler import Profiler
from vit_dist.monitoring.progress import Progress
from vit_dist.monitoring.starts import Starts
from vit_dist.monitoring.writer import make_writer
from vit_dist.run.best import Best
from vit_dist.run.build import Evaluation, make_state, make_step
from vit_dist.run.check import check
from vit_dist.run.evals import Evals
from vit_dist.run.input import train_data
from vit_dist.run.loop import Guards, Loop
from vit_dist.storage.lock import WorkdirLock
from vit_dist.training.checkpoint import Checkpointer

SMOKE = {"image_size": 32, "depth": 1, "steps": 1, "rounds": 1}


def measure(args: argparse.Namespace, workdir: str, starts: Starts) -> list[tuple[float, float]]:
    steps = args.steps
    config = _config.get_config(args.variant, image_size=args.image_size, depth=args.depth)
    # So long that neither the schedule ends nor a save comes up.
    config.total_steps, config.log_steps, config.save_steps = 10**6, steps, 10**6
    options, data = check(finalize(config))
    strategy = make_strategy(**options.evaluation.strategy)
    state = make_state(options, strategy)
    # A single host: what it gathers from all hosts is its own number.
    preemption = Preemption()
    preemption.attach(lambda number: [number])
    writer, progress = make_writer(workdir), Progress(options.total_steps, title="loop")
    watchdog = Watchdog(meet(None, timeout_seconds=1.0), timeout_seconds=1.0)
    loop = Loop(
        options,
        data,
        strategy=strategy,
        state=state,
        train_steps=make_step(options, data, state, strategy),
        evaluate=Evaluation(options.evaluation, data, state.eval_model, strategy),
        evals=Evals(options.evaluation, data, state.eval_model, strategy),
        checkpointer=Checkpointer(workdir),
        best=Best(options.best, workdir, strategy),
        writer=writer,
        progress=progress,
        guards=Guards(preemption, watchdog, WorkdirLock(workdir), starts),
        profiler=Profiler(workdir, first=0, count=0, active=False),
        micro_batch=options.input.batch_size,
        note=print,
    )
    # The end of a run saves; that is not what is measured here.
    loop.save = lambda step, tensors: None
    batch = next(iter(train_data(options, data, strategy, first_step=0)))
    batches = iter(tf.data.Dataset.from_tensors(batch).cache().repeat())
    n = tf.constant(steps, tf.int64)
    # The first call traces and compiles.
    loop.train_steps(batches, n)

    def bare_step() -> float:
        began = time.perf_counter()
        loop.train_steps(batches, n)["loss"].numpy()
        return (time.perf_counter() - began) / steps

    results, before = [], bare_step()
    # The bare step before and after the whole loop: a machine that gets slower meanwhile, or
    # faster, is then neither's fault.
    for _ in range(args.rounds):
        # Two log intervals: the second one has no start of the pipeline in it.
        loop.first = int(state.step.numpy())
        loop.calendar = dataclasses.replace(loop.calendar, total=loop.first + 2 * steps)
        whole = loop.run(evaluated=("val",))["seconds_per_step"]
        after = bare_step()
        results.append(((before + after) / 2, whole))
        before = after
    writer.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="Ti/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--depth", type=int, help="number of blocks")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    args = _smoke.parse(parser, SMOKE)
    machine = Machine(smoke=args.smoke, record=args.record)
    with tempfile.TemporaryDirectory() as workdir, Starts().open(workdir) as starts:
        results = measure(args, workdir, starts)
    bare = statistics.median(b for b, _ in results)
    whole = statistics.median(w for _, w in results)
    ratios = sorted(w / b for b, w in results)
    machine.conclude(
        f"{args.variant} at {args.image_size}, batch 16: bare step {bare * 1e3:.0f} ms, "
        f"whole loop {whole * 1e3:.0f} ms, ratio {statistics.median(ratios):.3f} (rounds "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}, n={args.rounds}; limit 1.02)",
        ratios,
    )


if __name__ == "__main__":
    main()
