"""What importing the package does, and does not."""

import os
import subprocess
import sys
from pathlib import Path

from tools.house import read_modules

ROOT = Path(__file__).resolve().parents[1]


def test_no_import_touches_a_device():
    """Logical devices can be set only while TensorFlow has not looked at the real ones."""
    script = f"""
import importlib
for module in {[module.name for module in read_modules(ROOT)]}:
    importlib.import_module(module)
import tensorflow as tf
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
assert len(tf.config.list_logical_devices("CPU")) == 2
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tests_see_four_cpus(cpus):
    import tensorflow as tf

    devices = tf.config.list_logical_devices("CPU")
    assert [device.name for device in devices] == [f"/device:{cpu}" for cpu in cpus]
