"""benchmarks/train_step.py and workers.py beside timm, once and tiny."""

import re

import pytest

from tests.support.benchmarks import run_benchmark
from tests.support.interop import NEEDS_PEERS

pytestmark = [pytest.mark.slow, NEEDS_PEERS]


def test_train_step(tmp_path):
    out = run_benchmark("train_step", "--smoke", folder=tmp_path)
    assert re.search(r"vit_dist [\d.]+ images/s, timm [\d.]+ images/s, ratio [\d.]+", out), out


@pytest.mark.exhaustive  # six processes that import TensorFlow or PyTorch
def test_workers(tmp_path):
    out = run_benchmark("workers", "--smoke", folder=tmp_path)
    assert re.search(r"efficiency [\d.]+; timm .* ratio of efficiencies [\d.]+ ", out), out
