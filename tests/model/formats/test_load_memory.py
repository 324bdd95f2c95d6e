"""What loading takes of memory, beside the model that it fills; in processes of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import processes
from vit_dist.model.formats.writing import write_pretrained
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.run.origins import open_origin

SMALL = {"num_classes": 1000, "pool": "tok"}


def peak():
    """The highest use of memory by this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024


def fill(path):
    """Fills a model and prints how far the highest use of memory rose by it."""
    model = build_vit(vit_config("S/16", image_size=384, **SMALL))
    before = peak()
    report = open_origin(str(path)).fill(model)
    found = [peak() - before, path.stat().st_size, len(report.loaded), report.resized]
    print(f"found {json.dumps(found)}")


@pytest.fixture(scope="module")
def network():
    """Weights of 87 MB by name, and their network."""
    model = build_vit(vit_config("S/16", image_size=224, **SMALL))
    shapes = {name: tuple(v.shape) for name, v in named_weights(model).items()}
    arrays = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    return arrays, model.get_config()


@pytest.mark.slow
@pytest.mark.spawns
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("system", "name"), [("npz", "a.npz"), ("timm", "a.safetensors")])
def test_a_file_is_never_in_memory_as_a_whole(network, tmp_path, system, name):
    arrays, made = network
    write_pretrained(tmp_path / name, system, arrays, made, mean=[0.5], std=[0.5])
    code, text = processes.call(fill, tmp_path / name, log=tmp_path / "log")
    assert code == 0, text
    rise, size, loaded, resized = json.loads(re.findall("found (.*)", text)[0])
    assert loaded > 140 and len(resized) == 1 and size > 80e6
    assert rise < 0.25 * size, f"{rise / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB"


def run(*arguments):
    command = [sys.executable, "-c", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]


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
