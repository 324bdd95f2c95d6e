"""Runs the scripts of benchmarks/."""

import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from tests.support import processes

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
REAL = subprocess.Popen, subprocess.run


def run_benchmark(name, *flags, folder, forks=False):
    """What `python benchmarks/NAME.py FLAGS` prints, in a fork that has TensorFlow already.

    With `forks` so are the processes that it starts: each would import TensorFlow, which takes
    longer than what they measure of something tiny.
    """
    path = str(BENCHMARKS / f"{name}.py")
    code, text = processes.call(_run, path, flags, forks, log=folder / "log")
    assert code == 0, f"exit code {code}: {text[-3000:]}"
    return text


def _run(path, flags, forks):
    if forks:
        subprocess.Popen, subprocess.run = Fork, _run_fork
    sys.argv = [path, *flags]
    sys.path.insert(0, str(BENCHMARKS))  # where Python looks first when it is given a file
    runpy.run_path(path, run_name="__main__")


class Fork:
    """What the benchmarks use of a subprocess.Popen, for `python FILE ...` and `python -m ...`."""

    def __init__(self, command, *, env=None, cwd=None, stdout=None, stderr=None, text=False):
        assert command[0] == sys.executable, command
        read, write = os.pipe() if stdout == subprocess.PIPE else (None, None)
        sys.stdout.flush()
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            code = 1
            try:
                if write is not None:
                    os.dup2(write, 1)
                    os.close(read)
                os.environ.update(env or {})
                os.chdir(cwd or ".")
                sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
                code = _be(command[1:])
            finally:
                sys.stdout.flush()
                os._exit(code)
        self.stdout = None
        if write is not None:
            os.close(write)
            self.stdout = open(read, "r" if text else "rb")  # noqa: SIM115

    def communicate(self):
        printed = self.stdout.read() if self.stdout else None
        self.wait()
        return printed, None

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)

    def wait(self):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _be(words):
    """Runs [-m] NAME FLAGS...; returns the exit code."""
    subprocess.Popen, subprocess.run = REAL
    try:
        if words[0] == "-m":
            processes.main(*words[1:])
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run_fork(command, *, check=False, capture_output=False, stdout=None, text=False, env=None):
    """subprocess.run; what goes to stderr stays in the benchmark's own log."""
    fork = Fork(command, env=env, text=text, stdout=subprocess.PIPE if capture_output else stdout)
    printed, _ = fork.communicate()
    assert not check or fork.returncode == 0, f"exit code {fork.returncode}: {command}"
    return subprocess.CompletedProcess(command, fork.returncode, printed, "")
