"""Time and memory of loading ViT-B/16 at 384 px from a file of 224 px, against 3 x the file.

    .venv/bin/python benchmarks/load_weights.py

Files of 86 million random parameters in vision_transformer's and timm's layouts are loaded by two
routes, each in a process of its own: by the functions alone, as predict and export call them, and
by a training with config.init_from, whose optimizer needs memory too (here SGD with a momentum in
bfloat16). Memory is VmHWM, the most that the process ever had, TensorFlow's libraries included; the
shares of imports, model and optimizer are printed separately.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _smoke
from _machine import Machine
from _process import memory

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 3.0
CLASSES = 1000
SMOKE = {"variant": "Ti/16", "depth": 1, "file_size": 32, "image_size": 48}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--depth", type=int, help="number of blocks")
    parser.add_argument("--file_size", type=int, default=224, help="resolution of the file")
    parser.add_argument("--image_size", type=int, default=384, help="resolution of the model")
    parser.add_argument("--step", choices=STEPS, help="do this alone, in this process")
    parser.add_argument("--paths", nargs="*", help="the files of the step")
    args = _smoke.parse(parser, SMOKE)
    if args.step:
        STEPS[args.step](args)
        return
    machine = Machine(smoke=args.smoke, record=args.record)
    with tempfile.TemporaryDirectory() as folder:
        name = args.variant.replace("/", "_")
        paths = [str(Path(folder) / f"{name}.{ending}") for ending in ("npz", "safetensors")]
        _run("write", *paths)
        for path in paths:
            machine.conclude(_run("load", path))
        machine.conclude(_run("train", paths[0]))


def _run(step: str, *paths: str) -> str:
    # A process for each step: VmHWM never falls, so steps in one process would hide each other.
    command = [sys.executable, __file__, *sys.argv[1:], "--step", step, "--paths", *paths]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
    return done.stdout.rstrip().rpartition("\n")[2]


def _write(args: argparse.Namespace) -> None:
    # Imported here and below: the parent process needs none of it.
    import numpy as np

    from vit_dist.model.formats.writing import write_pretrained
    from vit_dist.model.variants import vit_config
    from vit_dist.model.vit import build_vit, named_weights

    sizes = {"image_size": args.file_size, "depth": args.depth, "num_classes": CLASSES}
    model = build_vit(vit_config(args.variant, pool="tok", **sizes))
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(v.shape, np.float32) for n, v in named_weights(model).items()}
    for path, system in zip(args.paths, ("npz", "timm"), strict=True):
        half = {"mean": [0.5], "std": [0.5]}
        write_pretrained(Path(path), system, arrays, model.get_config(), **half)


def _load(args: argparse.Namespace) -> None:
    from vit_dist.model.variants import vit_config
    from vit_dist.model.vit import build_vit
    from vit_dist.run import cli  # noqa: F401  before TensorFlow, as in every command
    from vit_dist.run.origins import open_origin

    marks = {"imports": memory("VmHWM")}
    sizes = {"image_size": args.image_size, "depth": args.depth, "num_classes": CLASSES}
    model = build_vit(vit_config(args.variant, pool="tok", **sizes))
    marks["model"] = memory("VmHWM")
    begin = time.perf_counter()
    origin = open_origin(args.paths[0])
    report = origin.fill(model)
    seconds = time.perf_counter() - begin
    marks["loading"] = memory("VmHWM")
    # Only the position embeddings have to be resampled to the new resolution.
    assert len(report.resized) == 1 and not report.new, report
    _print("the functions", args.paths[0], seconds, marks)


def _train(args: argparse.Namespace) -> None:
    from vit_dist.cluster.strategy import make_strategy
    from vit_dist.config import get_defaults
    from vit_dist.run import cli  # noqa: F401  before TensorFlow, as in every command
    from vit_dist.run.build import make_state
    from vit_dist.run.check import check
    from vit_dist.run.start import find_start, restore_or_init

    config, path = get_defaults(), args.paths[0]
    config.image_size, config.total_steps, config.init_from = args.image_size, 1, path
    config.input.train_ops = config.input.eval_ops = "decode|resize(size)|value_range(-1, 1)"
    config.data.source, config.data.num_classes = "synthetic", CLASSES
    config.model.variant, config.model.depth = args.variant, args.depth
    config.model.pool = "tok"
    config.optimizer.name, config.optimizer.weight_decay = "sgd", 0.0
    config.optimizer.momentum_dtype = "bfloat16"
    options, data = check(config)
    # A workdir that does not exist: the start is init_from's.
    start = find_start(f"{path}.run", options)
    strategy = make_strategy(**options.evaluation.strategy)
    marks = {"imports": memory("VmHWM")}
    state = make_state(options, strategy)
    marks["model and optimizer"] = memory("VmHWM")
    begin = time.perf_counter()
    text = restore_or_init(state, options, data, start)
    seconds = time.perf_counter() - begin
    marks["loading"] = memory("VmHWM")
    assert "resized: pos_embedding" in text and "new:" not in text, text
    _print("config.init_from", path, seconds, marks)


def _print(route: str, path: str, seconds: float, marks: dict[str, int]) -> None:
    # `marks` are peaks one after the other; each part is what it added, over the file's size.
    size, before, parts = os.path.getsize(path), 0, []
    for name, peak in marks.items():
        parts.append(f"{name} {(peak - before) / size:.2f}")
        before = peak
    total = before / size
    print(
        f"{route}, {Path(path).name} of {size / 1e6:.0f} MB: {seconds:.1f} s; peak "
        f"{before / 1e6:.0f} MB, {total:.2f} x the file ({', '.join(parts)}; limit {LIMIT:.0f})"
    )


STEPS = {"write": _write, "load": _load, "train": _train}

if __name__ == "__main__":
    main()
