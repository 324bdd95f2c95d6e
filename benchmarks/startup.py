"""Time from process start to the first step, and of a restart: Ti/16 at 224, batch 16.

    .venv/bin/python benchmarks/startup.py [--variant Ti/16] [--rounds 3] [--cache]

The limit is 20 s for Ti/16: 10 s to trace and compile the step, and 10 s for imports, data and
weights. A restart is the same command again, after SIGTERM, up to its own first step; its ratio is
to the start. With --cache XLA keeps what it compiles in a folder (docs/clusters.md), which is empty
at the start.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _smoke
from _machine import Machine

from vit_dist.cluster.preemption import PREEMPTED

HERE = Path(__file__).resolve().parent
LIMITS = {"Ti/16": 20.0}
SMOKE = {"image_size": 32, "depth": 1, "rounds": 1}


def start(args: argparse.Namespace, workdir: str) -> tuple[float, float]:
    """Starts the run; returns seconds until training begins, and until its first step is printed.

    Then it is told to stop, and saves.
    """
    command = [sys.executable, "-m", "vit_dist.train", "--config", str(HERE / "_config.py")]
    command += [f"--config.image_size={args.image_size}", f"--config.model.variant={args.variant}"]
    command += [f"--config.model.depth={args.depth}"] if args.depth else []
    command += ["--config.total_steps=1000000", "--workdir", workdir]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if args.cache:
        env["TF_XLA_FLAGS"] = f"--tf_xla_persistent_cache_directory={workdir}/xla"
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    ready = first = 0.0
    # The run itself prints what is looked for: the line before its loop, and its first step.
    for line in process.stdout:
        if line.startswith("TensorBoard:"):
            ready = time.perf_counter() - began
        if not first and re.match(r"step \d+/", line):
            first = time.perf_counter() - began
            process.terminate()
    code = process.wait()
    if code != PREEMPTED or not ready or not first:
        raise SystemExit(f"the run ended with code {code} after {first:.0f} s to its first step")
    return ready, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="Ti/16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--depth", type=int, help="number of blocks")
    parser.add_argument("--cache", action="store_true", help="of what XLA has compiled")
    args = _smoke.parse(parser, SMOKE)
    machine = Machine(smoke=args.smoke, record=args.record)
    starts, restarts = [], []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as workdir:
            starts.append(start(args, workdir))
            restarts.append(start(args, workdir)[1])
    ready = statistics.median(r for r, _ in starts)
    first = statistics.median(f for _, f in starts)
    again = statistics.median(restarts)
    limit = LIMITS.get(args.variant)
    cached = ", programs kept" if args.cache else ""
    of_limit = f", {first / limit:.2f} of the limit" if limit else ""
    machine.conclude(
        f"{args.variant} at {args.image_size}{cached}: {ready:.1f} s to the model, "
        f"{first - ready:.1f} s to compile the first step and run it; {first:.1f} s in all"
        f"{of_limit}; a restart {again:.1f} s, {again / first:.2f} of it (n={args.rounds})",
        [f for _, f in starts],
    )


if __name__ == "__main__":
    main()
