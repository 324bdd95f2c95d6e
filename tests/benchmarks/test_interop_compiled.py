"""The benchmarks that JAX compiles, once and tiny, for this processor."""

import json
import re

import pytest

from tests.support.benchmarks import run_benchmark
from tests.support.interop import NEEDS_PEERS, PYTHON

pytestmark = [pytest.mark.slow, NEEDS_PEERS]


def test_gpu_step(tmp_path):
    """The folder that a machine with a GPU gets, run by JAX on this processor."""
    flags = ("--smoke", f"--folder={tmp_path}/step", f"--python={PYTHON}")
    out = run_benchmark("gpu_step", *flags, folder=tmp_path)
    for name in ("vit_dist", "flax"):
        said = rf"^{name}: [\d.]+ ms a step, MFU no peak known, temp \d+ MB, arguments \d+ MB$"
        assert re.search(said, out, re.M), out
    assert re.search(r"over flax: ratio [\d.]+ \(rounds", out), out
    about = json.loads((tmp_path / "step" / "about.json").read_text())
    assert any(re.search(match, "NVIDIA H100 80GB HBM3", re.I) for match in about["peaks"])


def test_tpu_compile(tmp_path):
    """With JAX's compiler for CPUs in the place of libtpu's, which is another environment's."""
    flags = ("--smoke", "--peer", "--topology=cpu", f"--python={PYTHON}", f"--cache={tmp_path}/c")
    out = run_benchmark("tpu_compile", *flags, folder=tmp_path)
    for name in ("vit_dist", "flax and optax"):
        assert re.search(rf"^{name}: temp \d+ MB, arguments \d+ MB, bytes accessed", out, re.M), out
    ratio = re.search(r"ratio to flax and optax: temp ([\d.]+), accessed ([\d.]+)", out)
    assert all(0.2 < float(value) < 5 for value in ratio.groups()), out


def test_tpu_recipes(tmp_path):
    out = run_benchmark("tpu_recipes", "--smoke", f"--python={PYTHON}", folder=tmp_path)
    # Memory, temp, the expected time, images a second; of a processor neither cycles nor off-chip
    # bytes are told.
    n = r"([\d.,]+)"
    row = rf"^\| `demo` \|  \| 128 \| {n} \| {n} \| - \({n}\) \| {n} \| - \|"
    *_, expected, images = re.search(row, out, re.M).groups()
    assert float(images.replace(",", "")) == pytest.approx(128e3 / float(expected), rel=0.02)


def test_tpu_options(tmp_path):
    flags = ("--smoke", "--topology=cpu", f"--python={PYTHON}", f"--cache={tmp_path}/cache")
    out = run_benchmark("tpu_options", *flags, folder=tmp_path)
    for name in ("plain", "remat full"):
        assert re.search(rf"^\| {name} \| \d+ \| \d+ \|( [\d.]+ \|){{3}} \d+ \|", out, re.M), out
