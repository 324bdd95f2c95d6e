"""Time from process start to the first step: Ti/16 at 224, batch 16, against a limit of 20 seconds.

    .venv/bin/python benchmarks/startup.py [--rounds 3]

The limit is 10 s to trace and compile the step, and 10 s for imports, data and weights.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _smoke
from _machine import Machine

HERE = Path(__file__).resolve().parent
LIMIT = 20.0
SMOKE = {"image_size": 32, "depth": 1, "rounds": 1}


def measure(args: argparse.Namespace, workdir: str) -> tuple[float, float]:
    """Seconds until training begins, and until the metrics of the first step are printed."""
    command = [sys.executable, "-m", "vit_dist.train", "--config", str(HERE / "_config.py")]
    command += [f"--config.image_size={args.image_size}"]
    command += [f"--config.model.depth={args.depth}"] if args.depth else []
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--workdir", workdir],
        cwd=HERE.parent,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    # The run itself prints what is looked for: the line before its loop, and its first step.
    ready = None
    for line in process.stdout:
        if line.startswith("TensorBoard:"):
            ready = time.perf_counter() - began
        if line.startswith("step 1/"):
            first = time.perf_counter() - began
            process.kill()
            process.wait()
            return ready, first
    raise SystemExit(f"the run ended with code {process.wait()} before its first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--depth", type=int, help="number of blocks")
    args = _smoke.parse(parser, SMOKE)
    machine = Machine(smoke=args.smoke, record=args.record)
    results = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as workdir:
            results.append(measure(args, workdir))
    ready = statistics.median(r for r, _ in results)
    first = statistics.median(f for _, f in results)
    machine.conclude(
        f"Ti/16 at {args.image_size}: {ready:.1f} s to the model, {first - ready:.1f} s to compile "
        f"the first step and run it; {first:.1f} s in all, "
        f"{first / LIMIT:.2f} of the limit (n={args.rounds})",
        [f / LIMIT for _, f in results],
    )


if __name__ == "__main__":
    main()
