"""Machines by their names."""

import pytest

from vit_dist.config.errors import ConfigError
from vit_dist.costs.targets import EXAMPLES, parse_target

# name -> row of the table, kind, devices, hosts; as Google's and NVIDIA's pages have them.
MACHINES = {
    "v5e-1": ("TPU v5e", "TPU", 1, 1),
    "v5e-8": ("TPU v5e", "TPU", 8, 1),
    "v5litepod-16": ("TPU v5e", "TPU", 16, 4),
    "v6e-256": ("TPU v6e", "TPU", 256, 64),
    "v4-8": ("TPU v4", "TPU", 4, 1),
    "v4-32": ("TPU v4", "TPU", 16, 4),
    "v5p-16": ("TPU v5p", "TPU", 8, 2),
    "8xA100-80GB": ("A100 80 GB", "GPU", 8, 1),
    "8xA100": ("A100 40 GB", "GPU", 8, 1),
    "8xH100": ("H100", "GPU", 8, 1),
    "h200": ("H200", "GPU", 1, 1),
    "1xRTX4090": ("RTX 4090", "GPU", 1, 1),
    "2xRTX 3090": ("RTX 3090", "GPU", 2, 1),
}


@pytest.mark.parametrize("name", MACHINES)
def test_names(name):
    target = parse_target(name)
    assert (target.device.name, target.kind, target.num_devices, target.hosts) == MACHINES[name]


def test_a_cpu_is_measured_and_shared():
    one, two = parse_target("cpu"), parse_target("2xcpu")
    assert one.kind == "CPU" and two.num_devices == 2 and two.hosts == 1
    assert two.device.memory == one.device.memory / 2
    assert one.device.float32 > 1e-3 and one.device.bandwidth > 0.1  # GFLOP/s, and 100 MB/s


@pytest.mark.parametrize("name", ["", "0xH100", "9xH10", "v5e-3", "v5e-12x", "v4-4", "v9-8", "tpu"])
def test_what_cannot_be(name):
    with pytest.raises(ConfigError, match="--target"):
        parse_target(name)


def test_examples_are_known():
    for name in EXAMPLES.split(", "):
        assert parse_target(name).num_devices
