"""A supervisor whose workers are forks of itself: they have TensorFlow without importing it.

`supervise` does what `python -m vit_dist.launch WORDS` does, in a process that has imported
TensorFlow. Only how a worker comes into being is replaced: os.fork, and not subprocess.Popen. So a
start takes one second instead of six.
"""

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import types
from multiprocessing import resource_tracker

from vit_dist.cluster.preemption import SIGNALS


class Fork:
    """What the supervisor uses of a subprocess.Popen."""

    def __init__(self, command, *, env, stdout, **_):
        # What `worker.bound` has put in front ends with the number of the parent.
        words = command[command.index(str(os.getpid())) + 1 :]
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.stdout, self.returncode = os.fdopen(read, "rb", buffering=0), None
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                _begin(env, write)
                code = _run(words)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(write)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def _default(number):
    return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL


def _begin(env, write):
    """Turns the child into what a new process would be."""
    from vit_dist.run import notices

    parent = os.getppid()
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, as worker._BIND
    assert os.getppid() == parent, "the supervisor has ended"
    signal.set_wakeup_fd(-1)
    for number in (*SIGNALS, signal.SIGCHLD):
        signal.signal(number, _default(number))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.closerange(3, 4096)
    notices._kept = None  # its file has just been closed
    # So has the pipe to multiprocessing's tracker, a process that would be started once more, and
    # keep standard error open to the end.
    resource_tracker._resource_tracker._fd = os.open(os.devnull, os.O_WRONLY)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)


def _run(words):
    """PYTHON -m MODULE FLAGS; returns the exit code."""
    assert words[1] == "-m", words
    sys.argv = list(words[2:])
    try:
        importlib.import_module(words[2]).script()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def supervise(words, environment):
    """For processes.Call: the command with these words and these variables more."""
    from vit_dist import launch
    from vit_dist.cluster import worker

    os.environ.update(environment)
    # The background jobs of a script ignore SIGINT, and nohup SIGHUP: their heirs would, too.
    for number in SIGNALS:
        signal.signal(number, _default(number))
    names = ("PIPE", "STDOUT", "DEVNULL")
    constants = {name: getattr(subprocess, name) for name in names}
    worker.subprocess = types.SimpleNamespace(Popen=Fork, **constants)
    sys.argv = ["vit_dist.launch", *words]
    launch.script()
