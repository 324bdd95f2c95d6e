"""One TensorFlow setting for all tests: the CPU alone, seen as four devices; and their kinds."""

import collections
import faulthandler
import importlib
import itertools
import os
import time
import types

# Before TensorFlow is imported. Two xdist workers share a machine that may have two cores only.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's would spin beside TensorFlow's
os.environ["GCS_RETRY_CONFIG_MAX_RETRIES"] = "2"  # of what a bucket may answer later, such as 503
os.environ["GCS_RETRY_CONFIG_INIT_DELAY_TIME_US"] = "1000"
for variable in ("TF_CONFIG", "KERAS_BACKEND", "TPU_NAME"):
    os.environ.pop(variable, None)  # those of whoever runs the tests

import pytest  # noqa: E402
from etils import epath  # noqa: E402

from tests.support import seconds  # noqa: E402
from tests.support.bucket import serve_bucket  # noqa: E402
from tests.support.kinds import MARKERS, Watch, kinds_of  # noqa: E402

WATCH = pytest.StashKey[Watch]()
STDERR = pytest.StashKey[int]()
HEARD = pytest.StashKey[dict[object, set[str]]]()  # fixture -> what its set-up did


def pytest_addoption(parser):
    parser.addoption("--write-seconds", action="store_true", help="of each test: seconds.json")


def pytest_configure(config):
    """Splits the CPU before a test touches it: MirroredStrategy then has 2 or 4 devices."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(config))
        if config.getoption("numprocesses", None):
            return  # only hands tests to its workers
    importlib.import_module("vit_dist.run.cli")  # TensorFlow, without what is slow to import
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    # Grappler takes longer for a function than the few times that a test runs it. Steps that XLA
    # compiles do without it in any case, and tests that start a command have it.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    config.stash[WATCH], config.stash[HEARD] = Watch(), {}
    config.stash[STDERR] = os.dup(2)  # before tests' output is caught


class Failures:
    """Prints a failure when it happens, and not only at the end: that may never come."""

    def __init__(self, config):
        self._config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            terminal = self._config.pluginmanager.getplugin("terminalreporter")
            terminal.write_line("")
            terminal.write_sep("!", f"{time.strftime('%H:%M:%S')} {report.nodeid} ({report.when})")
            terminal.write_line(report.longreprtext[-5000:])


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Marks the tests, and puts them in order."""
    for item in items:
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        functions = [item.function, *(f.func for f in _fixtures(item)), *params]
        functions = [f for f in functions if isinstance(f, types.FunctionType)]
        for kind in kinds_of(functions, item.fixturenames):
            item.add_marker(kind)
    measured = seconds.read()
    files = collections.Counter()
    for item in items:
        if seconds.is_slow(*measured.get(seconds.name_of(item.nodeid), (0, 0))):
            item.add_marker("slow")
    for name, (_, together) in measured.items():
        files[name.partition("::")[0]] += together
    # The processes take file after file, and end together if the long files come first.
    items.sort(key=lambda item: -files[item.nodeid.partition("::")[0]])


def _fixtures(item):
    """The definitions of the fixtures of a test."""
    return [found[-1] for found in item._fixtureinfo.name2fixturedefs.values()]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Limits a test's time where pytest-timeout cannot, and keeps it from ending this process.

    A call into C++ code that does not return ends the process, after a dump of where it stands.
    """
    marks = [mark.args[0] for mark in item.iter_markers("timeout")]
    seconds = (marks or [float(item.config.getini("timeout") or 300)])[0]
    faulthandler.dump_traceback_later(seconds + 30, exit=True, file=item.config.stash[STDERR])
    process, leave = os.getpid(), os._exit

    def leave_child(code):
        if os.getpid() != process:
            leave(code)
        raise AssertionError(f"{item.nodeid} calls os._exit({code}), which would end all tests")

    os._exit = leave_child
    try:
        return (yield)
    finally:
        os._exit = leave
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    with request.config.stash[WATCH].listen() as heard:
        request.config.stash[HEARD][fixturedef] = heard
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that does what no marker says fails: `make check` would start it."""
    with item.config.stash[WATCH].listen() as heard:
        result = yield
    for fixture in _fixtures(item):
        heard |= item.config.stash[HEARD].get(fixture, set())
    for kind in heard - {mark.name for mark in item.iter_markers()}:
        pytest.fail(f"this test {MARKERS[kind]}: write @pytest.mark.{kind} above it", pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter, config):
    """The process that hands tests out has heard of all of them."""
    if config.getoption("--write-seconds"):
        reports = itertools.chain.from_iterable(terminalreporter.stats.values())
        seconds.write((r.nodeid, r.duration) for r in reports if hasattr(r, "duration"))


@pytest.fixture
def cpus():
    """The names of the four logical CPUs."""
    return [f"CPU:{i}" for i in range(4)]


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    """A server that is gs://bucket where its environment is set."""
    with serve_bucket(tmp_path_factory.mktemp("bucket")) as served:
        yield served


@pytest.fixture
def remote(bucket, monkeypatch, count=itertools.count()):  # noqa: B008
    """A folder in a bucket, of its own: TensorFlow remembers for seconds what others hold."""
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    path = epath.Path(f"gs://bucket/{next(count)}")
    path.mkdir(parents=True)
    yield path
    bucket.refuse(0)
