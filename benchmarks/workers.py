"""Two workers on the cores of this machine against one process, beside timm's DDP on the same work.

    .venv/bin/python benchmarks/workers.py [--variant S/16] [--image_size 64] [--batch_size 32]

The efficiency of a system is the images/s of two workers, half of the batch and half of the cores
each, over those of one process that has the batch and all cores. What it lacks to 1 goes into the
all-reduce over loopback, its copies, and the update that every worker does. timm runs under
PyTorch's DistributedDataParallel with gloo. All run in processes of their own and take turns. The
ratio is that of the efficiencies. Goal: at least 1.0.
"""

import argparse
import json
import os
import statistics
import sys

import _smoke
from _machine import Machine
from _process import free_ports
from _stepping import OURS, PEER, PEERS, Worker

SMOKE = {"variant": "Ti/16", "image_size": 32, "depth": 1, "batch_size": 2, "steps": 1, "rounds": 1}


class Pair:
    """Two workers that step together."""

    def __init__(self, python: str, script: str, *arguments: str):
        ports = free_ports(2)
        self.workers = [
            Worker(python, script, *arguments, env=variables(script, ports, index), wait=False)
            for index in range(2)
        ]
        for worker in self.workers:
            worker.wait_until_ready()

    def seconds(self, steps: int) -> float:
        """Runs so many steps; returns the seconds of the slower worker."""
        for worker in self.workers:
            worker.begin(steps)
        return max(worker.finish() for worker in self.workers)

    def close(self) -> None:
        for worker in self.workers:
            worker.process.stdin.close()
        for worker in self.workers:
            worker.process.wait()


def variables(script: str, ports: list[int], index: int) -> dict[str, str]:
    """What tells a worker of its cluster."""
    if script == PEERS:
        return {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(ports[0]),
            "WORLD_SIZE": str(len(ports)),
            "RANK": str(index),
        }
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    return {
        "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="S/16")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--depth", type=int, default=12, help="number of blocks")
    parser.add_argument("--batch_size", type=int, default=32, help="of both workers together")
    parser.add_argument("--steps", type=int, default=5, help="steps per round")
    parser.add_argument("--rounds", type=int, default=7)
    args = _smoke.parse(parser, SMOKE)
    if not PEER.exists():
        raise SystemExit("timm is not installed: run `make bench`")
    machine = Machine(smoke=args.smoke, record=args.record)
    cores = os.cpu_count() or 1
    work = (args.variant, *map(str, (args.image_size, args.depth, args.batch_size)))
    measured: dict[str, Worker | Pair] = {}
    for system, python, script in (("ours", sys.executable, OURS), ("timm", str(PEER), PEERS)):
        measured[f"{system} alone"] = Worker(python, script, *work, str(cores))
        measured[f"{system} two"] = Pair(python, script, *work, str(max(cores // 2, 1)))
    times: dict[str, list[float]] = {name: [] for name in measured}
    # Two steps that are not counted fill caches and allocators.
    for each in measured.values():
        each.seconds(2)
    for _ in range(args.rounds):
        for name, each in measured.items():
            times[name].append(each.seconds(args.steps))
    for each in measured.values():
        each.close()
    rate = {
        name: args.batch_size * args.steps / statistics.median(found)
        for name, found in times.items()
    }
    efficiency = {s: rate[f"{s} two"] / rate[f"{s} alone"] for s in ("ours", "timm")}
    # The ratio of each round shows how far noise moves it.
    rounds = sorted(
        (ours_alone / ours_two) / (timm_alone / timm_two)
        for ours_alone, ours_two, timm_alone, timm_two in zip(*times.values(), strict=True)
    )
    machine.conclude(
        f"{args.variant} at {args.image_size}, batch {args.batch_size}: vit_dist "
        f"{rate['ours two']:.1f} images/s with two workers, {rate['ours alone']:.1f} alone, "
        f"efficiency {efficiency['ours']:.2f}; timm {rate['timm two']:.1f} and "
        f"{rate['timm alone']:.1f}, {efficiency['timm']:.2f}; ratio of efficiencies "
        f"{efficiency['ours'] / efficiency['timm']:.2f} (rounds {rounds[0]:.2f} to "
        f"{rounds[-1]:.2f}, n={args.rounds})",
        rounds,
    )


if __name__ == "__main__":
    main()
