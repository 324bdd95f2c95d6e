"""Commands in processes of their own, forked from one that has imported TensorFlow already."""

import contextlib
import importlib
import multiprocessing
import os
import resource
import sys
from pathlib import Path

from tests.support.clusters import environments
from tests.support.waiting import wait_for

TINY = str(Path(__file__).with_name("tiny.py"))

# A fork takes 0.1 s, an import of TensorFlow 5 s. The server touches no device.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vit_dist.train", "sklearn.datasets"])


class Process:
    """A process that writes into a log; ends with the test's `with`."""

    def __init__(self, process, *, log):
        self.log, self._process, self.pid = Path(log), process, process.pid

    def wait(self, seconds=280):
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
        try:
            return wait_for(condition, seconds, alive=self._process.is_alive)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.text()[-2000:]}") from error

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
      errors: file for what it prints to stderr, if that is not the log.
      module: another command.
      cwd: folder in which it runs.
      env: more variables. Those that TensorFlow reads when it is imported come too late.
      file_limit: largest file it may write, in bytes: a disk that is full.
    """

    def __init__(
        self, *flags, log, errors=None, module="vit_dist.train", cwd=".", env=None, file_limit=None
    ):
        outputs = (os.path.abspath(log), os.path.abspath(errors or log))
        words = (module, *map(str, flags))
        arguments = (words, outputs, os.path.abspath(cwd), env or {}, file_limit)
        super().__init__(_start(_command, arguments), log=log)


class Call(Process):
    """A function of a test module, running."""

    def __init__(self, function, *args, log):
        super().__init__(_start(_call, (function, args, str(log))), log=log)


def _start(target, arguments):
    process = _CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def run(*flags, log, **options):
    """Runs the command to its end; returns its exit code and what it printed."""
    with Command(*flags, log=log, **options) as command:
        code = command.wait()
        return code, command.text()


@contextlib.contextmanager
def hosts(*flags, log, count=2):
    """A cluster whose hosts are Commands with the same flags; they write into LOG-0, LOG-1, ..."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Command(*flags, log=f"{log}-{index}", env=environment))
            for index, environment in enumerate(environments(count))
        ]


def call(function, *args, log):
    """Calls a function of a test module in a fork; returns its exit code and what it printed."""
    with Call(function, *args, log=log) as process:
        code = process.wait()
        return code, process.text()


def start(function, *args):
    """Starts a function of a test module in a fork; returns the process."""
    process = _CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def main(name, *arguments):
    """Does what `python -m NAME ARGUMENTS` would, such as vit_dist.export; for `call`."""
    sys.argv = [name, *arguments]
    importlib.import_module(name).script()


def _call(function, args, log):
    _print_into(log, log)
    function(*args)


def _print_into(*paths):
    """Leads stdout and stderr into files."""
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def _command(words, outputs, cwd, env, file_limit):
    _print_into(*outputs)
    os.chdir(cwd)
    os.environ.update(env)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    main(*words)
