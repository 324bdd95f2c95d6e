"""Runs the scripts of launch/."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make_env(**variables):
    unset = ("TF_CONFIG", "TPU_NAME", "TPU_ZONE", "TPU_PROJECT", "TPU_TYPE", "TPU_VERSION")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    return env | {"PYTHON": sys.executable} | variables


def launch(script, *args, timeout=60, **variables):
    command = [str(ROOT / "launch" / script), *map(str, args)]
    return subprocess.run(
        command, env=make_env(**variables), capture_output=True, text=True, timeout=timeout
    )
