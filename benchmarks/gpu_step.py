"""Our training step on a GPU of a machine without TensorFlow, beside the same step in flax.

    .venv/bin/python benchmarks/gpu_step.py --folder step [--variant S/16] [--batch_size 256]
    (copy the folder to a machine with a GPU, JAX, flax and optax, and there)
    python step/run.py

TensorFlow exports the whole step (forward, backward, clip, AdamW; bfloat16) as HLO, with the form
of the layers that GPUs get. run.py lets JAX's client compile and run it, and the peer of
_flax_step.py in turn: step time, MFU, memory of both, and the ratio. This is XLA's program of the
step, which TensorFlow's own XLA would compile as well; TensorFlow's input and its all-reduce are
not in it.
With --python the folder is run at once by that interpreter, on the device that its JAX finds.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import _smoke
from _tpu_step import HERE, Setting, export_step
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2

from vit_dist.costs import tpu_compiler
from vit_dist.costs.devices import DEVICES
from vit_dist.costs.flops import train_flops

# XLA's names of dtypes -> NumPy's.
NAMES = {"U8": "uint8", "S32": "int32", "S64": "int64", "F32": "float32", "BF16": "bfloat16"}
NAMES |= {"PRED": "bool", "U32": "uint32", "F16": "float16"}
SMOKE = {"variant": "Ti/16", "image_size": 32, "depth": 1, "batch_size": 2, "rounds": 1}


def export(args: argparse.Namespace) -> None:
    """Writes the folder: the step, what is known of it, and all that run.py imports."""
    model = {"softmax": "compute"} | ({"depth": args.depth} if args.depth else {})
    setting = Setting(
        args.variant,
        image_size=args.image_size,
        batch_size=args.batch_size,
        model=model,
        kind="GPU",
    )
    step, num_params = export_step(setting)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.hlo").write_bytes(step)
    about = {
        "variant": args.variant,
        "image_size": args.image_size,
        "depth": args.depth,
        "batch_size": args.batch_size,
        "num_params": num_params,
        "flops": args.batch_size * train_flops(setting.make_model().get_config()),
        **describe(step),
        # regex of a device's name -> its peak, for MFU
        "peaks": {d.match: d.peak("bfloat16") for d in DEVICES if d.peak("bfloat16")},
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2))
    shutil.copy(HERE / "_gpu_run.py", folder / "run.py")
    shutil.copy(HERE / "_flax_step.py", folder)
    shutil.copy(tpu_compiler.__file__, folder)
    print(f"wrote {folder}: on a machine with a GPU and JAX run python {folder.name}/run.py")


def describe(step: bytes) -> dict:
    """What a program takes: (shape, dtype) of each parameter, and which output is its new value."""
    module = hlo_pb2.HloModuleProto.FromString(step)
    kinds = xla_data_pb2.PrimitiveType
    return {
        "parameters": [
            (list(shape.dimensions), NAMES[kinds.Name(shape.element_type)])
            for shape in module.host_program_shape.parameters
        ],
        "places": {
            entry.parameter_number: entry.output_shape_index[0]
            for entry in module.input_output_alias.entries
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="runs/gpu_step", help="that is written")
    parser.add_argument("--variant", default="S/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--depth", type=int, help="number of blocks")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--python", help="run it, too, with this interpreter, which has JAX")
    args = _smoke.parse(parser, SMOKE, kept=False)
    export(args)
    if args.python:
        command = [args.python, f"{args.folder}/run.py", "--rounds", str(args.rounds)]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
