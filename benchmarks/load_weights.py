"""Time and memory of loading ViT-B/16 at 384 px from an .npz, against a limit of 3 x the file.

In a process of its own: builds the model, then reads a file of 86 million random parameters in
vision_transformer's layout and resamples its positions from 224 px. Peak memory is the process's
high-water mark (ru_maxrss); what TensorFlow takes before anything is loaded is told apart.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "B_16.npz"
        for step in (_write, _read):
            command = [sys.executable, __file__, step.__name__, str(path)]
            env = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
            subprocess.run(command, check=True, env=env)


def _write(path: str) -> None:
    import numpy as np

    from vit_dist.model.formats.writing import write_pretrained
    from vit_dist.model.variants import vit_config
    from vit_dist.model.vit import build_vit, named_weights

    model = build_vit(vit_config("B/16", image_size=224, num_classes=1000, pool="tok"))
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(v.shape, np.float32) for n, v in named_weights(model).items()}
    half = {"mean": [0.5], "std": [0.5]}
    write_pretrained(Path(path), "npz", arrays, model.get_config(), **half)


def _read(path: str) -> None:
    from vit_dist.model.variants import vit_config
    from vit_dist.model.vit import build_vit
    from vit_dist.model.weights import adapt_weights
    from vit_dist.origins import open_origin

    started = _peak()
    model = build_vit(vit_config("B/16", image_size=384, num_classes=1000, pool="tok"))
    built, begin = _peak(), time.perf_counter()
    origin = open_origin(path)
    report = adapt_weights(model, origin.tensors, source=origin.network)
    seconds, size = time.perf_counter() - begin, os.path.getsize(path)
    assert len(report.resized) == 1 and not report.new, report
    print(f"file {size / 1e6:.0f} MB, {len(origin.tensors)} tensors, loaded in {seconds:.1f} s")
    print(
        f"peak memory {_peak() / 1e6:.0f} MB: TensorFlow {started / 1e6:.0f}, model "
        f"{(built - started) / 1e6:.0f}, loading {(_peak() - built) / 1e6:.0f}"
    )
    print(f"peak memory / file: {(_peak() - started) / size:.2f} beside TensorFlow (limit 3)")


def _peak() -> int:
    """Bytes; Linux counts in units of 1024."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        {"_write": _write, "_read": _read}[sys.argv[1]](sys.argv[2])
