"""Machines by their names."""

import pytest

from vit_dist.config.errors import ConfigError
from vit_dist.costs.devices import DEVICES, Device
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
    "2x8xH100": ("H100", "GPU", 16, 2),
    "4x1xH200": ("H200", "GPU", 4, 4),
    "8xH100": ("H100", "GPU", 8, 1),
    "h200": ("H200", "GPU", 1, 1),
    "1xRTX4090": ("RTX 4090", "GPU", 1, 1),
    "2xRTX 3090": ("RTX 3090", "GPU", 2, 1),
    "A100:8": ("A100 40 GB", "GPU", 8, 1),
    "A100-80GB:8": ("A100 80 GB", "GPU", 8, 1),
    "8 x H100": ("H100", "GPU", 8, 1),
    "2 x 8 x H100": ("H100", "GPU", 16, 2),
    "8xNVIDIA H100 80GB HBM3": ("H100", "GPU", 8, 1),
    "8xH100-SXM5": ("H100", "GPU", 8, 1),
    "4xH100 PCIe": ("H100 PCIe", "GPU", 4, 1),
    "8xTesla V100-SXM2-32GB": ("V100 32 GB", "GPU", 8, 1),
    "GeForce RTX 4090": ("RTX 4090", "GPU", 1, 1),
    "T4:4": ("T4", "GPU", 4, 1),
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


@pytest.mark.parametrize(
    "name",
    [
        "",
        "0xH100",
        "0x8xH100",
        "2x0xH100",
        "2x2xcpu",
        "2x2x2xH100",
        "9xH10",
        "8xA100:8",
        "A100:0",
        "A100:",
        "H100x8",
        "8*H100",
        "8 H100",
        "DGX H100",
        "8xh100,8xa100",
        "8xh100,8xa100-80GB",
        "8xA100-16GB",
        "8xT4-80GB",
        "8xH100 NVL",
        "A100:8-80GB",
        "H100 8x",
        "8xH100\nH100",
        "v5e-3",
        "v5e-12x",
        "v4-4",
        "v9-8",
        "tpu",
    ],
)
def test_what_cannot_be(name):
    with pytest.raises(ConfigError, match="--target"):
        parse_target(name)


def test_cards_of_a_file_are_named_by_their_regex():
    own = Device("Mine", "my card( 2)?", 12, None, None, 6)
    better = Device("Better", "a100", 140, None, None, 6)
    part = Device("RTX A7000", "a7000", 140, None, None, 6)
    devices = (*DEVICES, own, better, part)
    # Also by the name of the row, of which the regex may be a part alone.
    for name in ("8xRTX A7000", "8xRTX-A7000", "8xA7000"):
        assert parse_target(name, devices)[2:4] == (part, 8)
    for name in ("8xmy card", "8xMy Card 2", "my card:8"):
        assert parse_target(name, devices)[2:4] == (own, 8)
    for name in ("8xA100", "8xA100-80GB"):
        assert parse_target(name, devices).device == better
    for name in ("my cardx8", "my card 3", "A100x8"):
        with pytest.raises(ConfigError, match=r"--target.* is unknown"):
            parse_target(name, devices)


def test_a_ring_over_hosts_is_as_fast_as_their_network():
    # 900 GB/s, both directions together.
    assert parse_target("8xH100").link == 450
    assert parse_target("2x8xH100").link is None
    assert parse_target("2x8xH100", network=400).link == 50
    # No network makes the cards' own links faster.
    assert parse_target("2x8xH100", network=1e5).link == 450
    # A TPU's chips have links of their own to those of other hosts.
    assert parse_target("v5e-16").link == 200


@pytest.mark.parametrize(
    ("name", "network"), [("8xH100", 400), ("v5e-16", 400), ("cpu", 1), ("2x8xH100", 0)]
)
def test_networks_that_cannot_be(name, network):
    with pytest.raises(ConfigError, match="--network"):
        parse_target(name, network=network)


def test_examples_are_known():
    for name in EXAMPLES.split(", "):
        assert parse_target(name).num_devices
