"""What takes a test its time: does it start processes, compile, talk to the tests' bucket?

`make check` runs the tests that do none of it. The markers come from two places:

- from what the code of a test names (`kinds_of`), so that nobody has to write the usual ones;
- by hand, `@pytest.mark.spawns`, where that does not show.

`Watch` notices what happens while a test runs. What no marker says fails the test.
"""

import inspect
import multiprocessing.process
import sys
import types
from collections.abc import Collection, Iterator
from contextlib import contextmanager

MARKERS = {
    "spawns": "starts a process",
    "compiles": "calls XLA, or builds a training step or an input pipeline",
    "bucket": "talks to the tests' own bucket",
    "slow": "takes more than two CPU seconds for another reason",
    "exhaustive": "one case more of what others prove by example; `make test-all` runs it",
}
# Functions of the package that start a process.
STARTERS = {"hidden"}
# Functions of the package that build a step or an input pipeline, or end in one. To trace one takes
# a second; with XLA some more.
BUILDERS = {
    "train",
    "evaluate",
    "make_step",
    "Evaluation",
    "make_train_step",
    "make_gradients",
    "make_update",
    "make_evaluator",
    "make_train_data",
    "make_eval_data",
    "train_data",
    "eval_data",
    "stages",
}
# https://docs.python.org/3/library/audit_events.html
STARTS = {"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.system", "os.exec"}


def kinds_of(functions: Collection[types.FunctionType], fixtures: Collection[str]) -> set[str]:
    """The markers of a test, as its code shows them.

    Args:
      functions: the test's own and those of its fixtures.
      fixtures: names of its fixtures.
    """
    kinds = {"bucket"} & set(fixtures)
    for value in _names(functions):
        home = value.__name__ if isinstance(value, types.ModuleType) else _module(value)
        ours = getattr(value, "__name__", "") if home.startswith("vit_dist.") else ""
        if home.startswith(("subprocess", "multiprocessing")) or ours in STARTERS:
            kinds.add("spawns")
        if ours in BUILDERS or (isinstance(value, str) and value == "jit_compile"):
            kinds.add("compiles")
    return kinds


def _names(functions: Collection[types.FunctionType]) -> Iterator[object]:
    """What functions name, and what the tests' own functions and classes among it name in turn."""
    waiting, seen = list(functions), set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if function in seen:
            continue
        seen.add(function)
        if isinstance(function, type):
            waiting += [v for v in vars(function).values() if isinstance(v, types.FunctionType)]
            continue
        for code in _with_inner(function.__code__):
            named = [function.__globals__.get(name) for name in code.co_names]
            for module in [value for value in named if isinstance(value, types.ModuleType)]:
                if module.__name__.startswith(("tests.", "vit_dist.")):
                    # `processes.run` is two names, and nothing in the code says that they are one.
                    named += [vars(module).get(name) for name in code.co_names]
            for value in map(inspect.unwrap, named):  # what functools.cache and others wrap
                if isinstance(value, types.FunctionType | type) and _module(value)[:6] == "tests.":
                    waiting.append(value)
                elif value is not None:
                    yield value
            # The keywords of calls are constants: ("jit_compile", "autograph").
            keywords = [k for c in code.co_consts if isinstance(c, tuple) for k in c]
            yield from {"jit_compile"}.intersection(k for k in keywords if isinstance(k, str))


def _module(value: object) -> str:
    return getattr(value, "__module__", None) or type(value).__module__


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


class Watch:
    """Notices in this process who starts others and who calls XLA."""

    def __init__(self) -> None:
        import tensorflow as tf  # here: pytest's own process, which only hands tests out, has none

        self._listening: list[set[str]] = []
        sys.addaudithook(lambda event, _: self._note("spawns") if event in STARTS else None)
        process, function = multiprocessing.process.BaseProcess, type(tf.function(print))
        start, call = process.start, function.__call__

        def noted_start(process):
            self._note("spawns")
            return start(process)

        def noted_call(function, *args, **kwargs):
            if function._jit_compile:
                self._note("compiles")
            return call(function, *args, **kwargs)

        process.start, function.__call__ = noted_start, noted_call

    def _note(self, kind: str) -> None:
        for heard in self._listening:
            heard.add(kind)

    @contextmanager
    def listen(self) -> Iterator[set[str]]:
        """Yields the kinds noticed within the block; still empty when it begins."""
        heard: set[str] = set()
        self._listening.append(heard)
        try:
            yield heard
        finally:
            # By identity: two empty sets are equal.
            self._listening = [other for other in self._listening if other is not heard]
