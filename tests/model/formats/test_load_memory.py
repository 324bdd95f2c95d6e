"""What loading takes of memory, beside the model that it fills; in processes of their own."""

import json
import subprocess
import sys

import pytest

# Imports, a file of 87 MB, a model to fill, and how far the highest use of memory rose by filling.
LOAD = """
import json, os, re, sys
from pathlib import Path
import numpy as np
from vit_dist.model.formats.writing import write_pretrained
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.run.origins import open_origin

def peak():
    return int(re.findall(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[0]) * 1024

system, path = sys.argv[1], Path(sys.argv[2])
options = {"num_classes": 1000, "pool": "tok"}
if not path.exists():
    model = build_vit(vit_config("S/16", image_size=224, **options))
    arrays = {n: np.full(v.shape, 0.5, np.float32) for n, v in named_weights(model).items()}
    write_pretrained(path, system, arrays, model.get_config(), mean=[0.5], std=[0.5])
    sys.exit()
model = build_vit(vit_config("S/16", image_size=384, **options))
before = peak()
origin = open_origin(str(path))
report = origin.fill(model)
print(json.dumps([peak() - before, path.stat().st_size, len(report.loaded), report.resized]))
"""


def run(*arguments):
    command = [sys.executable, "-c", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("system", "name"), [("npz", "a.npz"), ("timm", "a.safetensors")])
def test_a_file_is_never_in_memory_as_a_whole(tmp_path, system, name):
    run(LOAD, system, tmp_path / name)
    rise, size, loaded, resized = json.loads(run(LOAD, system, tmp_path / name))
    assert loaded > 140 and len(resized) == 1 and size > 80e6
    assert rise < 0.25 * size, f"{rise / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB"


def test_commands_leave_out_what_keras_takes_along():
    run(
        "import sys\n"
        "from vit_dist.run import cli\n"
        "heavy = {'matplotlib', 'scipy', 'sklearn'}\n"
        "assert 'tensorflow' in sys.modules and not heavy & set(sys.modules), sys.modules\n"
        "import scipy.ndimage, sklearn.datasets\n"  # nothing stays hidden
        "assert len(sklearn.datasets.load_digits().target) == 1797\n"
        "import vit_dist.train, keras\n"
        "keras.layers.Dense(2)\n"
    )
