"""What one training step takes on a TPU v5e, compiled ahead of time on a machine without one.

    make bench-tpu   or   .venv/bin/python benchmarks/tpu_compile.py [--variant Ti/16] [--peer]

TensorFlow exports the whole step (forward, backward, clip, AdamW) as HLO. libtpu's compiler, in an
environment of its own, turns the HLO into a TPU program and reports what the program needs: memory
besides its arguments, bytes accessed, flops. Bytes accessed include copies between the two kinds of
memory on the chip. --peer also compiles the same step written with flax and optax, which takes some
minutes more.

LIMITS are the numbers of big_vision's step, compiled at the default settings.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _smoke
import tensorflow as tf

from vit_dist.model.variants import choose_form, vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.training.losses import make_loss
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
from vit_dist.training.schedules import Schedule
from vit_dist.training.state import TrainState
from vit_dist.training.step import make_gradients, make_update

HERE = Path(__file__).resolve().parent
COMPILER = HERE.parent / ".venv-tpu-compile" / "bin" / "python"
LIMITS = {"temp": 448e6, "accessed": 7.76e9}  # Ti/16, batch 32, bfloat16, 224 px
SIZE = 224
SMOKE = {"batch_size": 2, "model": ["depth=1"]}


def export_step(path: str, variant: str, *, batch_size: int, accumulation: int, model: dict) -> int:
    """Writes the step's HLO and returns the number of parameters."""
    # "TPU" here, though nothing of it runs: layers have another form on TPUs.
    network = build_vit(
        vit_config(variant, image_size=SIZE, num_classes=1000, **model),
        precision="bfloat16",
        form=choose_form("TPU"),
    )
    state = TrainState(
        network, make_optimizer(named_weights(network), OptimizerOptions(weight_decay=0.1))
    )
    gradients = make_gradients(
        state,
        make_loss(),
        preprocess=lambda images: tf.cast(images, tf.float32) / 127.5 - 1,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=0,
    )
    schedule = Schedule(1e-3, total_steps=100_000, warmup_steps=10_000)
    update = make_update(state, schedule=schedule, clip_norm=1.0, ema_decay=None)

    # One replica without a strategy: gradients and update follow each other in one program.
    @tf.function(jit_compile=True, autograph=False)
    def step(images, labels):
        done = update(*gradients({"image": images, "label": labels}, tf.constant(0)))
        return done.metrics

    images = tf.TensorSpec((batch_size, SIZE, SIZE, 3), tf.uint8)
    labels = tf.TensorSpec((batch_size,), tf.int32)
    compiled = step.experimental_get_compiler_ir(images, labels)
    Path(path).write_bytes(compiled(stage="hlo_serialized"))
    return network.count_params()


def compile_for_tpu(args: argparse.Namespace, *what: str) -> dict[str, float]:
    # In another interpreter, whose environment has JAX and libtpu.
    command = [args.python, str(HERE / "_tpu_compiler.py"), args.topology, *what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, found: dict[str, float]) -> None:
    print(
        f"{name}: temp {found['temp'] / 1e6:.0f} MB, arguments {found['arguments'] / 1e6:.0f} MB, "
        f"bytes accessed {found['accessed'] / 1e9:.2f} GB, flops {found['flops'] / 1e9:.0f} G",
        flush=True,
    )


def show_ratios(found: dict[str, float], other: dict[str, float], name: str) -> None:
    ratios = ", ".join(f"{key} {found[key] / other[key]:.2f}" for key in ("temp", "accessed"))
    print(f"ratio to {name}: {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="Ti/16")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in the step")
    parser.add_argument("--topology", default="v5e:1x1", help="also v5p:2x2x1, v6e:1x1, ..., cpu")
    parser.add_argument("--python", default=str(COMPILER), help="that has JAX, and libtpu")
    parser.add_argument("--model", nargs="*", default=[], help="keys of config.model: pool=tok")
    parser.add_argument("--peer", action="store_true", help="compile flax and optax beside it")
    args = _smoke.parse(parser, SMOKE)
    if not Path(args.python).exists():
        raise SystemExit("libtpu is not installed: run `make bench-tpu`")
    model = {"softmax": "compute", **dict(pair.split("=", 1) for pair in args.model)}
    model = {key: _literal(value) for key, value in model.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "step.hlo")
        count = export_step(
            path, args.variant, batch_size=args.batch_size, accumulation=args.accumulation,
            model=model,
        )  # fmt: skip
        print(
            f"{args.variant} ({count} parameters), {SIZE} px, batch {args.batch_size} in "
            f"{args.accumulation} micro-batches, bfloat16, {model}, for {args.topology}",
            flush=True,
        )
        found = compile_for_tpu(args, path)
    show("vit_dist", found)
    if (args.variant, args.batch_size, args.accumulation) == ("Ti/16", 32, 1):
        show_ratios(found, LIMITS, "big_vision's 448 MB and 7.76 GB")
    if args.peer:
        depth = [str(model["depth"])] if "depth" in model else []
        peer = compile_for_tpu(args, "peer", args.variant, str(args.batch_size), *depth)
        show("flax and optax", peer)
        show_ratios(found, peer, "flax and optax")


def _literal(text: str):
    # A number or None as such; a name, such as tok, as a string.
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    sys.exit(main())
