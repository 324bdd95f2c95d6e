"""The table of devices, and how a file extends it."""

import json

import pytest

from vit_dist.config.errors import ConfigError
from vit_dist.costs.devices import DEVICES, find_device, read_devices

# As drivers and clouds tell them.
NAMES = {
    "TPU v4-8": "TPU v4",
    "TPU v5litepod-16": "TPU v5e",
    "TPU tpu-v5-lite-podslice": "TPU v5e",
    "TPU v5p-8": "TPU v5p",
    "TPU v6e-8": "TPU v6e",
    "NVIDIA A100-SXM4-40GB": "A100 40 GB",
    "NVIDIA A100-SXM4-80GB": "A100 80 GB",
    "NVIDIA A100 80GB PCIe": "A100 80 GB",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA L4": "L4",
    "Tesla T4": "T4",
    "Tesla V100-SXM2-16GB": "V100 16 GB",
    "Tesla V100-SXM2-32GB": "V100 32 GB",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
}
# Cards of nearly the same name, with other numbers.
OTHERS = (
    "NVIDIA L40S",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA H100 NVL",
    "NVIDIA H200 NVL",
    "NVIDIA T400",
    "NVIDIA A100X",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A100-SXM4-80GB MIG 7g.80gb",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H100 PCIe MIG 1g.10gb",
    "NVIDIA H200 MIG 1g.18gb",
    "NVIDIA B200 MIG 1g.23gb",
    "Tesla V100-PCIE-16GB",
    "Tesla V100-PCIE-32GB",
    "Tesla V100S-PCIE-32GB",
    "Tesla V100-FHHL-16GB",
    "",
)


@pytest.mark.parametrize("name", NAMES)
def test_devices_are_found_by_the_names_that_drivers_tell(name):
    assert find_device(name).name == NAMES[name]


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not_taken_for_them(name):
    assert find_device(name) is None


def test_every_row_is_found_and_has_a_source():
    assert set(NAMES.values()) == {device.name for device in DEVICES}
    assert all(device.source and device.memory and device.bandwidth for device in DEVICES)


def test_peaks_are_those_that_tensorflow_reaches():
    a100 = find_device("NVIDIA A100-SXM4-80GB")
    assert (a100.peak("bfloat16"), a100.peak("float32")) == (312e12, 156e12)  # TF32
    assert find_device("TPU v5litepod-8").peak("float32") == 197e12
    assert find_device("Tesla T4").peak("bfloat16") is None


def test_a_file_adds_and_corrects(tmp_path):
    rows = {"Mine": {"match": "my card", "bfloat16": 12}, "Better": {"match": "a100", "tf32": 140}}
    (tmp_path / "d.json").write_text(json.dumps(rows))
    devices = read_devices(str(tmp_path / "d.json"))
    assert find_device("ACME My Card 2", devices).peak("bfloat16") == 12e12
    assert find_device("NVIDIA A100-SXM4-80GB", devices).peak("float32") == 140e12
    (tmp_path / "d.toml").write_text('[Mine]\nmatch = "my card"\nfloat16 = 3\n')
    devices = read_devices(str(tmp_path / "d.toml"))
    assert find_device("my card", devices).peak("float16") == 3e12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "must map names"),
        ('{"a": 3}', "must have fields"),
        ('{"a": {"match": "x", "bflat16": 3}}', "unknown field 'bflat16'; allowed: match"),
        ('{"a": {"bfloat16": 3}}', "needs 'match'"),
        ('{"a": {"match": "("}}', "needs 'match', a regex"),
        ('{"a": {"match": "x", "float32": -1}}', "float32 must be a number above 0, got -1"),
        ('{"a": {"match": "x", "float32": true}}', "float32 must be a number above 0, got True"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, message):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        read_devices(str(tmp_path / "d.json"))


@pytest.mark.parametrize("path", ["no/d.json", "~no.such.user/d.json"])
def test_a_file_that_is_not_there(path):
    with pytest.raises(ConfigError, match=r"config\.monitor\.device_file .* cannot be read"):
        read_devices(path)
