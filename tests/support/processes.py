"""Commands in processes of their own, forked from one that has imported TensorFlow already."""

import importlib
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path

TINY = str(Path(__file__).with_name("tiny.py"))

# A fork takes 0.1 s, an import of TensorFlow 5 s. The server touches no device.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vit_dist.train", "sklearn.datasets"])


class Process:
    """A process that writes into a log; ends with the test's `with`."""

    def __init__(self, process, *, log):
        self.log, self._process, self.pid = Path(log), process, process.pid

    def wait(self, seconds=120):
        """The exit code, negative for a signal."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running: {self.text()[-2000:]}"
        return self._process.exitcode

    def is_alive(self, seconds=0.0):
        """Whether it still runs after that time; returns earlier if it does not."""
        self._process.join(seconds)
        return self._process.exitcode is None

    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, condition, seconds=120):
        """Returns what `condition` returns once that is true; fails if the process ends before."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self._process.is_alive(), f"ended: {self.text()[-2000:]}"
            assert time.monotonic() < deadline, f"waited in vain: {self.text()[-2000:]}"
            time.sleep(0.02)
        return found

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._process.kill()
        self._process.join()


class Command(Process):
    """`python -m vit_dist.train FLAGS`, running.

    Args:
      flags: of the command.
      log: file for what it prints.
      env: more variables.
      file_limit: largest file it may write, in bytes: a disk that is full.
    """

    def __init__(self, *flags, log, env=None, file_limit=None):
        arguments = ([*map(str, flags)], str(log), env or {}, file_limit)
        super().__init__(_start(_train, arguments), log=log)


class Call(Process):
    """A function of a test module, running."""

    def __init__(self, function, *args, log):
        super().__init__(_start(_call, (function, args, str(log))), log=log)


def _start(target, arguments):
    process = _CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def wait_until(condition, seconds=60):
    """Returns what `condition` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def run(*flags, log, **options):
    """Runs the command to its end; returns its exit code and what it printed."""
    with Command(*flags, log=log, **options) as command:
        code = command.wait()
        return code, command.text()


def call(function, *args, log):
    """Calls a function of a test module in a fork; returns its exit code and what it printed."""
    with Call(function, *args, log=log) as process:
        code = process.wait()
        return code, process.text()


def main(name, *arguments):
    """Runs the command of a module, such as vit_dist.export; for `call`."""
    from vit_dist.run import cli

    sys.argv = [name, *arguments]
    module = importlib.import_module(name)
    module.define_flags()
    cli.run(module.main)


def _call(function, args, log):
    _print_into(log)
    function(*args)


def _print_into(log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _train(flags, log, env, file_limit):
    _print_into(log)
    os.environ.update(env)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["train.py", *flags]

    from vit_dist import train
    from vit_dist.run import cli

    train.define_flags()
    cli.run(train.main)
