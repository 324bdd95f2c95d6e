"""benchmarks/input.py beside its peers, once and tiny."""

import re

import pytest

from tests.support.benchmarks import run_benchmark
from tests.support.interop import NEEDS_PEERS

pytestmark = [pytest.mark.slow, NEEDS_PEERS]


def test_input(tmp_path):
    out = run_benchmark("input", "--smoke", folder=tmp_path)
    for system in ("reference", "timm"):
        said = rf"beside {system}: \d+ images/s, .*; {system} \d+ images/s, .* by CPU time [\d.]+ "
        assert re.search(said, out), out
    assert re.search(r"SolarizeAdd +[\d.]+ +[\d.]+", out), out
