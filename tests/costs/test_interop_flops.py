"""The count of FLOPs against XLA's cost analysis, which JAX shows, of networks of usual widths."""

import subprocess

from tests.support.flops import BATCH, program
from tests.support.interop import NEEDS_PEERS, PYTHON, ROOT
from vit_dist.costs.flops import train_flops
from vit_dist.model.variants import vit_config

pytestmark = NEEDS_PEERS

# Few blocks: each costs the same.
NETWORKS = {
    "Ti/16": {"depth": 2},
    "S/16": {"depth": 2, "pool": "map"},
    "S/14": {"depth": 1, "pool": "tok", "registers": 4},
    "B/16": {"depth": 1, "pool": "tok_gap", "rep_size": -1},
}


def test_within_two_percent_of_xla(tmp_path):
    networks = [
        vit_config(variant, image_size=224, num_classes=1000, **options)
        for variant, options in NETWORKS.items()
    ]
    paths = [tmp_path / f"{i}.hlo" for i in range(len(networks))]
    for network, path in zip(networks, paths, strict=True):
        path.write_bytes(program(network, stage="hlo_serialized"))
    command = [PYTHON, ROOT / "tests/support/interop_flops.py", *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = [float(line) for line in done.stdout.split()]
    assert len(counted) == len(networks)
    for variant, network, xla in zip(NETWORKS, networks, counted, strict=True):
        assert 0.98 < BATCH * train_flops(network) / xla <= 1, variant
