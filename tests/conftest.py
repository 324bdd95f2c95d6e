"""One TensorFlow setting for all tests: the CPU alone, seen as four devices."""

import itertools
import os

# Before TensorFlow is imported. Two xdist workers share a machine that may have two cores only.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
os.environ["GCS_RETRY_CONFIG_MAX_RETRIES"] = "2"  # of what a bucket may answer later, such as 503
os.environ["GCS_RETRY_CONFIG_INIT_DELAY_TIME_US"] = "1000"
for variable in ("TF_CONFIG", "KERAS_BACKEND", "TPU_NAME"):
    os.environ.pop(variable, None)  # those of whoever runs the tests

import pytest  # noqa: E402
from etils import epath  # noqa: E402

from tests.support.bucket import serve_bucket  # noqa: E402


def pytest_configure(config):
    """Splits the CPU before a test touches it: MirroredStrategy then has 2 or 4 devices."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import tensorflow as tf

        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 4
        )


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


def pytest_collection_modifyitems(items):
    """Muon is tested where Keras has the one that we mean."""
    from vit_dist.training.update_rules import HAS_MUON

    skip = pytest.mark.skip(reason="this Keras has another Muon, or none")
    for item in items:
        spec = getattr(item, "callspec", None)
        if not HAS_MUON and spec and "muon" in spec.params.values():
            item.add_marker(skip)
