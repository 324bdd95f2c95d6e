"""One TensorFlow setting for all tests: the CPU alone, seen as four devices."""

import os

# Before TensorFlow is imported. Two xdist workers share a machine that may have two cores only.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
for variable in ("TF_CONFIG", "KERAS_BACKEND", "TPU_NAME"):
    os.environ.pop(variable, None)  # those of whoever runs the tests

import pytest  # noqa: E402


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


def pytest_collection_modifyitems(items):
    """Muon is tested where Keras has the one that we mean."""
    from vit_dist.training.update_rules import HAS_MUON

    skip = pytest.mark.skip(reason="this Keras has another Muon, or none")
    for item in items:
        spec = getattr(item, "callspec", None)
        if not HAS_MUON and spec and "muon" in spec.params.values():
            item.add_marker(skip)
