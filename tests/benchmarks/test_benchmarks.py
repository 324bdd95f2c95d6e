"""Every benchmark runs, once and tiny. Those with peers are in test_interop_*.py."""

import re

import pytest

from tests.support.benchmarks import BENCHMARKS, ROOT, run_benchmark

ALONE = ("frozen", "load_weights", "loop_overhead", "memory", "prepared", "sharding", "startup")
WITH_PEERS = (
    "gpu_step",
    "input",
    "tpu_compile",
    "tpu_options",
    "tpu_recipes",
    "train_step",
    "workers",
)


def test_every_benchmark_is_tried():
    assert sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py")) == sorted(ALONE + WITH_PEERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("frozen", marks=pytest.mark.exhaustive), *ALONE[1:]])
def test_it_runs(name, tmp_path):
    out = run_benchmark(name, "--smoke", folder=tmp_path, forks=True)
    assert re.search(r"\d cores, .*load", out), "it does not tell its machine"
    assert re.search(r"\d", out.splitlines()[-1]), out


@pytest.mark.parametrize("name", sorted(ALONE + WITH_PEERS))
def test_a_result_is_kept_or_there_is_no_flag_for_it(name):
    source = (BENCHMARKS / f"{name}.py").read_text()
    assert ("record=args.record" in source) != ("kept=False" in source)


def test_make_runs_what_there_is():
    run = re.findall(r"python benchmarks/(\w+)\.py", (ROOT / "Makefile").read_text())
    assert {"train_step", "loop_overhead", "startup", "load_weights", "input"} < set(run)
    assert set(run) <= {*ALONE, *WITH_PEERS}
