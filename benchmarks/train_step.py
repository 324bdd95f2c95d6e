"""Train-step throughput against timm on PyTorch: same model, batch, AdamW, clip, float32, CPU.

    make bench   or   .venv/bin/python benchmarks/train_step.py [--variants Ti/16,S/16] [--rounds 7]

Each runs in a process of its own, and the two take turns, so that both meet the same noise of the
machine. The ratio is that of the median images/s. Goal: at least 1.0.
"""

import argparse
import os
import statistics
import sys

import _smoke
from _machine import Machine
from _stepping import OURS, PEER, PEERS, Worker

SMOKE = {
    "variants": "Ti/16",
    "image_size": 32,
    "depth": 1,
    "batch_size": 2,
    "steps": 1,
    "rounds": 1,
}


def compare(variant: str, args: argparse.Namespace, machine: Machine) -> None:
    batch_size, steps, rounds = args.batch_size, args.steps, args.rounds
    sizes = (args.image_size, args.depth, batch_size, args.threads)
    arguments = (variant, *map(str, sizes))
    ours, peer = Worker(sys.executable, OURS, *arguments), Worker(str(PEER), PEERS, *arguments)
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
    machine = Machine(smoke=args.smoke, record=args.record)
    for variant in args.variants.split(","):
        compare(variant, args, machine)


if __name__ == "__main__":
    main()
