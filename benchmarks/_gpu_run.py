"""Runs the exported step beside this file, and the peer in flax, on the device that JAX has.

    python run.py [--rounds 7] [--steps 10]

gpu_step.py copies this file into the folder that it writes. It needs JAX, flax and optax, and
neither TensorFlow nor vit_dist. Both steps take turns, so that both meet the same noise of the
machine.
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import tpu_compiler
from _flax_step import compile_step

HERE = Path(__file__).resolve().parent


class Ours:
    """The exported program; new values of variables take the places of old ones."""

    def __init__(self, device, about: dict):
        self.executable = tpu_compiler.compile_hlo(str(HERE / "step.hlo"), device)
        # JSON's keys are texts.
        self._places = {int(k): place for k, place in about["places"].items()}
        # JAX makes int64, the number of steps, an int32 otherwise.
        with jax.enable_x64(True):
            self._arguments = [
                jax.device_put(make_up(shape, jax.numpy.dtype(dtype)), device)
                for shape, dtype in about["parameters"]
            ]

    def run(self, steps: int) -> None:
        for _ in range(steps):
            out = self.executable.execute(self._arguments)
            for parameter, place in self._places.items():
                self._arguments[parameter] = out[place]
        jax.block_until_ready(out)


class Peer:
    """The step in flax and optax."""

    def __init__(self, device, about: dict):
        compiled, shapes = compile_step(
            device,
            about["variant"],
            about["batch_size"],
            image_size=about["image_size"],
            depth=about["depth"],
        )
        self._compiled, self.executable = compiled, compiled.runtime_executable()
        made = jax.tree.map(lambda a: jax.device_put(make_up(a.shape, a.dtype), device), shapes)
        self._params, self._state, *self._batch = made

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._params, self._state, loss = self._compiled(
                self._params, self._state, *self._batch
            )
        jax.block_until_ready(loss)


def make_up(shape: tuple, dtype: np.dtype) -> np.ndarray:
    """Values for a parameter: the time of a step does not depend on them."""
    random = np.random.default_rng(0)
    if np.issubdtype(dtype, np.floating) or dtype == jax.numpy.bfloat16:
        # Small, and positive: second moments are.
        return np.abs(random.normal(0, 0.02, shape)).astype(dtype)
    # Pixels; labels, and numbers of steps.
    return random.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    args = parser.parse_args()
    about = json.loads((HERE / "about.json").read_text())
    device = jax.devices()[0]
    peaks = [p for match, p in about["peaks"].items() if re.search(match, device.device_kind, re.I)]
    both = {"vit_dist": Ours(device, about), "flax": Peer(device, about)}
    for each in both.values():
        each.run(2)  # not counted: fills allocators
    times: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(args.rounds):
        for name, each in both.items():
            began = time.perf_counter()
            each.run(args.steps)
            times[name].append((time.perf_counter() - began) / args.steps)
    print(
        f"{about['variant']} at {about['image_size']} px, batch {about['batch_size']}, bfloat16, "
        f"{about['num_params']:,} parameters, on {device.device_kind}"
    )
    for name, found in times.items():
        median = statistics.median(found)
        memory = tpu_compiler.figures_of(both[name].executable)
        # The last row of the table that matches is the most special one.
        mfu = f"{about['flops'] / median / peaks[-1]:.1%}" if peaks else "no peak known"
        print(
            f"{name}: {1e3 * median:.2f} ms a step, MFU {mfu}, temp {memory['temp'] / 1e6:.0f} MB, "
            f"arguments {memory['arguments'] / 1e6:.0f} MB"
        )
    rounds = sorted(f / o for o, f in zip(*times.values(), strict=True))
    ratio = statistics.median(times["flax"]) / statistics.median(times["vit_dist"])
    print(
        f"speed of vit_dist over flax: ratio {ratio:.2f} (rounds {rounds[0]:.2f} to "
        f"{rounds[-1]:.2f}, n={args.rounds})"
    )


if __name__ == "__main__":
    main()
