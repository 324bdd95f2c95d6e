"""The time of a step by the roofline."""

import pytest

from vit_dist.costs.devices import Device
from vit_dist.costs.flops import layer_flops, remat_flops, train_flops
from vit_dist.costs.memory import count_state
from vit_dist.costs.step_time import step_time
from vit_dist.costs.targets import Target
from vit_dist.model.variants import vit_config
from vit_dist.training.optimizer import OptimizerOptions


def network(**options):
    return vit_config("mu/4", image_size=16, num_classes=5, **options)


def machine(count=1, **changed):
    numbers = {"bfloat16": 1.0, "float32": 1.0, "memory": 1.0, "bandwidth": 1.0, "link": 2.0}
    numbers |= changed
    device = Device("made up", "x", float16=None, tf32=None, **numbers)
    return Target("x", "GPU", device, count, 1)


def times(target, **options):
    config = network(**options)
    state = count_state(config, OptimizerOptions(), ema=False)
    return step_time(config, state, target, batch_size=8, precision="float32"), state


def test_operations_at_the_peak():
    found, _ = times(machine())
    assert found.compute == pytest.approx(8 * train_flops(network()) / 1e12)


def test_an_all_reduce_over_hosts_and_in_bfloat16():
    target = machine(count=4)._replace(hosts=2, network=0.25)
    found, state = times(target)
    assert found.all_reduce == pytest.approx(1.5 * state.gradients / 0.25e9)
    config = network()
    half = step_time(config, state, target, batch_size=8, precision="float32", sent_as="bfloat16")
    assert half.all_reduce == pytest.approx(found.all_reduce / 2)
    # Without a number for the network there is none for the time.
    assert times(target._replace(network=None))[0] is None


def test_an_all_reduce_is_a_ring():
    found, state = times(machine(count=4))
    # Each of 4 sends 2 * 3 / 4 of the gradients by half of 2 GB/s.
    assert found.all_reduce == pytest.approx(1.5 * state.gradients / 1e9)
    assert times(machine())[0].all_reduce == 0


@pytest.mark.parametrize(
    ("slow", "binds"),
    [("float32", "operations"), ("bandwidth", "memory traffic"), ("link", "all-reduce")],
)
def test_what_binds(slow, binds):
    found, _ = times(machine(count=2, **{slow: 1e-6}))
    assert found.binds == binds and found.floor <= found.expected


def test_a_missing_number():
    assert times(machine(bandwidth=None))[0] is None
    assert times(machine(count=2, link=None))[0] is None
    assert times(machine(link=None))[0] is not None


def test_remat_computes_again():
    plain = network(depth=2)
    layers = layer_flops(plain)
    blocks = [x for x in layers if x.name.startswith("encoderblock")]
    weights = [x for x in blocks if x.name.endswith(("/logits", "/sum"))]
    base = train_flops(plain)
    hidden = [x for x in blocks if x.name.endswith("/mlp/dense_0")]
    # Nobody asks for the output of a block that is computed again.
    output = [x for x in blocks if x.name.endswith("/mlp/dense_1")]
    for remat, again in (
        ("none", []),
        ("attention", weights),
        ("attention_mlp", weights + hidden),
        ("full", [x for x in blocks if x not in output]),
    ):
        more = sum(x.forward for x in again)
        assert remat_flops({**plain, "remat": remat}, None) == base + more


def test_a_cpu_does_one_after_the_other():
    target = machine()._replace(kind="CPU")
    found, _ = times(target)
    assert found.expected == found.compute + found.bytes_compiled
