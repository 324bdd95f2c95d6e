"""Train-step throughput against timm on PyTorch: same model, batch, AdamW, clip, float32, CPU.

    make bench   or   .venv/bin/python benchmarks/train_step.py [--variants Ti/16,S/16] [--rounds 7]

Each runs in a process of its own, and the two take turns, so that both meet the same noise of the
machine. The ratio is that of the median images/s. Goal: at least 1.0.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import _smoke
from _machine import Machine

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-interop" / "bin" / "python"
SMOKE = {
    "variants": "Ti/16",
    "image_size": 32,
    "depth": 1,
    "batch_size": 2,
    "steps": 1,
    "rounds": 1,
}


class Worker:
    """A process that times steps on request."""

    def __init__(self, python: str, script: str, *arguments: str):
        env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        self.process = subprocess.Popen(
            [python, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        # A worker prints "ready N" when it has compiled.
        self.num_params = int(self._read().split()[1])

    def _read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with code {self.process.wait()}")
        return line

    def seconds(self, steps: int) -> float:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(variant: str, args: argparse.Namespace, machine: Machine) -> None:
    batch_size, steps, rounds = args.batch_size, args.steps, args.rounds
    sizes = (args.image_size, args.depth, batch_size, args.threads)
    arguments = (variant, *map(str, sizes))
    ours = Worker(sys.executable, "_step_worker.py", *arguments)
    peer = Worker(str(PEER), "_timm_worker.py", *arguments)
    if ours.num_params != peer.num_params:
        raise SystemExit(f"not the same model: {ours.num_params} and {peer.num_params} parameters")
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    # Two steps that are not counted fill caches and allocators.
    for worker in (ours, peer):
        worker.seconds(2)
    for _ in range(rounds):
        times["ours"].append(ours.seconds(steps))
        times["peer"].append(peer.seconds(steps))
    ours.close()
    peer.close()
    rate = {k: batch_size * steps / statistics.median(v) for k, v in times.items()}
    ratio = rate["ours"] / rate["peer"]
    # The ratio of each round shows how far noise moves it.
    pairs = sorted(p / o for o, p in zip(times["ours"], times["peer"], strict=True))
    machine.conclude(
        f"{variant} at {args.image_size}, batch {batch_size}, {args.threads} threads: "
        f"vit_dist {rate['ours']:.2f} images/s, timm {rate['peer']:.2f} images/s, "
        f"ratio {ratio:.2f} (rounds {pairs[0]:.2f} to {pairs[-1]:.2f}, n={rounds})",
        pairs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="Ti/16,S/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--depth", type=int, default=12, help="number of blocks")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="steps per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = _smoke.parse(parser, SMOKE)
    if not PEER.exists():
        raise SystemExit("timm is not installed: run `make bench`")
    machine = Machine(smoke=args.smoke)
    for variant in args.variants.split(","):
        compare(variant, args, machine)


if __name__ == "__main__":
    main()
