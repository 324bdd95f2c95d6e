"""Runs the scripts of benchmarks/."""

import runpy
import sys
from pathlib import Path

from tests.support import processes

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run_benchmark(name, *flags, folder):
    """What `python benchmarks/NAME.py FLAGS` prints, in a fork that has TensorFlow already."""
    code, text = processes.call(_run, str(BENCHMARKS / f"{name}.py"), flags, log=folder / "log")
    assert code == 0, f"exit code {code}: {text[-3000:]}"
    return text


def _run(path, flags):
    sys.argv = [path, *flags]
    sys.path.insert(0, str(BENCHMARKS))  # where Python looks first when it is given a file
    runpy.run_path(path, run_name="__main__")
