"""`python -m vit_dist.launch` with a small program in the place of the training."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.launching import ROOT, make_env
from tests.support.waiting import wait_for

# What each worker begins with. `started` counts how often it was started before; each start leaves
# a file with the number of its process.
PROLOGUE = """
import json, os, pathlib, signal, subprocess, sys, threading, zlib
folder = pathlib.Path({folder!r})
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
started = len(list(folder.glob(f"pid-{{index}}-*")))
(folder / f"pid-{{index}}-{{started}}").write_text(str(os.getpid()))

def wait():
    while True:
        signal.pause()

def wait_for(name):
    while not (folder / name).exists():
        threading.Event().wait(0.01)

def on_term(*words, code):
    def handle(*_):
        print(*words, flush=True)
        os._exit(code)
    signal.signal(signal.SIGTERM, handle)

def save(step, *, torn=False):
    checkpoint = folder / "run" / "checkpoints" / f"{{step:09d}}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.safetensors").write_bytes(b"1234")
    crc = zlib.crc32(b"1234") + torn
    (checkpoint / "manifest.json").write_text(json.dumps({{"size": 4, "crc32": crc}}))
"""


class Launch:
    """The command, running; ends with the test's `with`.

    Args:
      folder: for its program, its pids and its workdir, "run".
      body: what each worker does, after PROLOGUE.
      options: of the command.
      prefix: words before the command.
      command: the words that begin it.
    """

    def __init__(self, folder, body, *options, prefix=(), command=()):
        self.folder = Path(folder)
        program = self.folder / "program.py"
        program.write_text(PROLOGUE.format(folder=str(folder)) + body)
        self.logs = self.folder / "run" / "logs"
        words = [*(command or (sys.executable, "-m", "vit_dist.launch")), f"--program={program}"]
        words += [f"--workdir={folder}/run", *options]
        if not any(option.startswith(("--workers", "--hosts")) for option in options):
            words.append("--workers=2")
        self.process = subprocess.Popen(
            [*map(str, prefix), *map(str, words)],
            cwd=ROOT,
            env=make_env(PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_hear_sigint,
        )

    def end(self, seconds=60):
        """(exit code, stdout, stderr)"""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    def send(self, number):
        self.process.send_signal(number)

    def starts(self, index):
        """How often a worker was started."""
        return len(list(self.folder.glob(f"pid-{index}-*")))

    def log(self, index):
        path = self.logs / f"worker-{index}.log"
        return path.read_text() if path.exists() else ""

    def wait_until_ready(self, count=2):
        """Returns when each worker has printed "ready"."""
        wait_for(
            lambda: all("ready" in self.log(i) for i in range(count)),
            alive=lambda: self.process.poll() is None,
        )

    def pids(self):
        return [int(path.read_text()) for path in self.folder.glob("pid-*")]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


def _hear_sigint():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the background jobs of a script ignore


def is_alive(pid):
    """Whether the process runs; one that only waits to be noticed does not."""
    try:
        return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid):
    """Numbers of the processes that a process has started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(path.parent.name))
    return found
