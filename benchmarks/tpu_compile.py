"""What one training step takes on a TPU v5e, compiled ahead of time on a machine without one.

    make bench-tpu   or   .venv/bin/python benchmarks/tpu_compile.py [--variant Ti/16] [--peer]

TensorFlow exports the whole step (forward, backward, clip, AdamW) as HLO. libtpu's compiler, in an
environment of its own, turns the HLO into a TPU program and reports what the program needs: memory
besides its arguments, bytes, cycles, flops. Bytes accessed include those that never leave the chip,
whose memory holds most of what operations pass on; those off the chip do not. Cycles are the
compiler's own estimate of all operations. What was compiled before is in the cache that `python -m
vit_dist.plan` uses, too. --peer also compiles the same step written with flax and optax, which
takes some minutes more.

LIMITS are the numbers of big_vision's step, compiled at the default settings.
"""

import argparse
import ast
import sys
from collections.abc import Mapping

import _smoke
from _tpu_step import (
    TOPOLOGY,
    Compiled,
    Setting,
    compile_peer,
    compile_step,
    export_step,
    open_compiler,
)

from vit_dist.costs.compiled import DEFAULT_PYTHON

LIMITS = {"temp": 448e6, "accessed": 7.76e9}  # Ti/16, batch 32, bfloat16, 224 px
SMOKE = {"batch_size": 2, "model": ["depth=1"]}


def show(name: str, found: Compiled) -> None:
    print(
        f"{name}: temp {found.temp / 1e6:.0f} MB, arguments {found.arguments / 1e6:.0f} MB, "
        f"bytes accessed {found.accessed / 1e9:.2f} GB, off the chip {found.offchip / 1e9:.2f} GB, "
        f"{found.cycles / 1e6:.2f} million cycles, flops {found.flops / 1e9:.0f} G, "
        f"code {found.code / 1e6:.1f} MB",
        flush=True,
    )


def show_ratios(found: Compiled, others: Mapping[str, float], name: str) -> None:
    """Each of the other's figures; for a processor there are neither cycles nor bytes off chip."""
    ratios = [f"{key} {getattr(found, key) / value:.2f}" for key, value in others.items() if value]
    print(f"ratio to {name}: {', '.join(ratios)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="Ti/16")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in the step")
    parser.add_argument("--topology", default=TOPOLOGY, help="also v5p:2x2x1, v6e:1x1, ..., cpu")
    parser.add_argument("--python", default=DEFAULT_PYTHON, help="that has JAX, and libtpu")
    parser.add_argument("--cache", default="", help="folder of what was compiled before")
    parser.add_argument("--model", nargs="*", default=[], help="keys of config.model: pool=tok")
    parser.add_argument("--peer", action="store_true", help="compile flax and optax beside it")
    args = _smoke.parse(parser, SMOKE, kept=False)
    compiler = open_compiler(args.python, args.cache or None)
    model = {"softmax": "compute", **dict(pair.split("=", 1) for pair in args.model)}
    model = {key: _literal(value) for key, value in model.items()}
    setting = Setting(
        args.variant,
        image_size=args.image_size,
        batch_size=args.batch_size,
        accumulation=args.accumulation,
        model=model,
    )
    step, count = export_step(setting)
    print(
        f"{args.variant} ({count} parameters), {setting.image_size} px, batch {args.batch_size} in "
        f"{args.accumulation} micro-batches, bfloat16, {model}, for {args.topology}",
        flush=True,
    )
    found = compile_step(compiler, step, args.topology)
    show("vit_dist", found)
    if setting == Setting(model={"softmax": "compute"}):
        show_ratios(found, LIMITS, "big_vision's 448 MB and 7.76 GB")
    if args.peer:
        depth = [str(model["depth"])] if "depth" in model else []
        sizes = [args.variant, str(args.batch_size), str(args.image_size)]
        peer = compile_peer(args.python, args.topology, *sizes, *depth)
        show("flax and optax", peer)
        compared = {key: getattr(peer, key) for key in ("temp", "accessed", "offchip", "cycles")}
        show_ratios(found, compared, "flax and optax")


def _literal(text: str):
    # A number or None as such; a name, such as tok, as a string.
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    sys.exit(main())
