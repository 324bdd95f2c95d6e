"""Time and memory of loading ViT-B/16 at 384 px from a file of 224 px, against 3 x the file.

    .venv/bin/python benchmarks/load_weights.py

Files of 86 million random parameters in vision_transformer's and timm's layouts. For each, and for
two routes, a process of its own: the functions alone, as predicting and exporting call them, and
the way that training takes through config.init_from, whose optimiser holds memory besides (here
SGD's, with a momentum in bfloat16). Memory is VmHWM, the highest there ever was of the process,
TensorFlow's libraries included: what imports, the model and the optimiser need is told apart.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _process import memory

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 3.0
VIT = {"image_size": 384, "num_classes": 1000, "pool": "tok"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("B_16.npz", "B_16.safetensors")]
        _run("_write", *paths)
        for path in paths:
            _run("_load", path)
        _run("_train", paths[0])


def _run(step: str, *paths: Path) -> None:
    command = [sys.executable, __file__, step, *map(str, paths)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run(command, check=True, env=env)


def _write(*paths: str) -> None:
    import numpy as np

    from vit_dist.model.formats.writing import write_pretrained
    from vit_dist.model.variants import vit_config
    from vit_dist.model.vit import build_vit, named_weights

    model = build_vit(vit_config("B/16", **{**VIT, "image_size": 224}))
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(v.shape, np.float32) for n, v in named_weights(model).items()}
    for path, system in zip(paths, ("npz", "timm"), strict=True):
        half = {"mean": [0.5], "std": [0.5]}
        write_pretrained(Path(path), system, arrays, model.get_config(), **half)


def _load(path: str) -> None:
    from vit_dist.model.variants import vit_config
    from vit_dist.model.vit import build_vit
    from vit_dist.run import cli  # noqa: F401  before TensorFlow, as in every command
    from vit_dist.run.origins import open_origin

    marks = {"imports": memory("VmHWM")}
    model = build_vit(vit_config("B/16", **VIT))
    marks["model"] = memory("VmHWM")
    begin = time.perf_counter()
    origin = open_origin(path)
    report = origin.fill(model)
    seconds = time.perf_counter() - begin
    marks["loading"] = memory("VmHWM")
    assert len(report.resized) == 1 and not report.new, report
    _print("the functions", path, seconds, marks)


def _train(path: str) -> None:
    from vit_dist.cluster.strategy import make_strategy
    from vit_dist.config import get_defaults
    from vit_dist.run import cli  # noqa: F401  before TensorFlow, as in every command
    from vit_dist.run.build import make_state
    from vit_dist.run.check import check
    from vit_dist.run.start import find_start, restore_or_init

    config = get_defaults()
    config.image_size, config.total_steps, config.init_from = VIT["image_size"], 1, path
    config.input.train_ops = config.input.eval_ops = "decode|resize(size)|value_range(-1, 1)"
    config.data.source, config.data.num_classes = "synthetic", VIT["num_classes"]
    config.model.variant, config.model.pool = "B/16", VIT["pool"]
    config.optimizer.name, config.optimizer.weight_decay = "sgd", 0.0
    config.optimizer.momentum_dtype = "bfloat16"
    options, _ = check(config)
    start = find_start(f"{path}.run", options)
    strategy = make_strategy(**options.evaluation.strategy)
    marks = {"imports": memory("VmHWM")}
    state = make_state(options, strategy)
    marks["model and optimiser"] = memory("VmHWM")
    begin = time.perf_counter()
    text = restore_or_init(state, options, start)
    seconds = time.perf_counter() - begin
    marks["loading"] = memory("VmHWM")
    assert "resized: pos_embedding" in text and "new:" not in text, text
    _print("config.init_from", path, seconds, marks)


def _print(route: str, path: str, seconds: float, marks: dict[str, int]) -> None:
    size, before, parts = os.path.getsize(path), 0, []
    for name, peak in marks.items():
        parts.append(f"{name} {(peak - before) / size:.2f}")
        before = peak
    total = before / size
    print(
        f"{route}, {Path(path).name} of {size / 1e6:.0f} MB: {seconds:.1f} s; peak "
        f"{before / 1e6:.0f} MB, {total:.2f} x the file ({', '.join(parts)}; limit {LIMIT:.0f})"
    )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        {"_write": _write, "_load": _load, "_train": _train}[sys.argv[1]](*sys.argv[2:])
