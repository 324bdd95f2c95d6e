"""How long a training step takes at least, and by what: operations, bytes, or the all-reduce.

The roofline model (Williams et al., CACM 52, 2009): a device is busy for the longer of
operations / peak and bytes / bandwidth, here with the sum of gradients over the links beside them.
Bytes are an estimate with two ends. At least each kept activation is written once and read twice
(by the next layer, by the backward pass), and the update reads and writes the state once. As
compiled programs count them, copies between the memories of a chip included, it is several times as
much: libtpu's compiler counts 18 times the kept bytes, and attention's weights once (docs/plan.md).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vit_dist.costs.flops import remat_flops
from vit_dist.costs.memory import State, activation_bytes
from vit_dist.costs.targets import Target

_LEAST_TRAFFIC, _COMPILED_TRAFFIC = 3, 18
# How much longer each policy takes, by cycles of Ti/16 compiled for a v5e (docs/tpu_options.md):
# what is computed again passes through the chip once more.
_REMAT_TRAFFIC = {"none": 1.0, "attention": 1.07, "attention_mlp": 1.16, "full": 1.21}


class StepTime(NamedTuple):
    """Seconds of a step on one device, by what takes them.

    Attributes:
      compute: products of matrices at the device's peak.
      bytes_least, bytes_compiled: its memory's traffic, see the module.
      all_reduce: the sum of gradients over all devices, were nothing else computed meanwhile.
      serial: whether a device computes and moves bytes by the same units, one after the other.
    """

    compute: float
    bytes_least: float
    bytes_compiled: float
    all_reduce: float
    serial: bool

    @property
    def floor(self) -> float:
        """Nothing can be faster."""
        return max(self.compute, self.bytes_least, self.all_reduce)

    @property
    def expected(self) -> float:
        """As compiled programs move bytes; on a CPU its cores do both."""
        if self.serial:
            return self.compute + self.bytes_compiled
        return max(self.compute, self.bytes_compiled) + self.all_reduce

    @property
    def binds(self) -> str:
        """What the expected time is due to."""
        parts = {
            "operations": self.compute,
            "memory traffic": self.bytes_compiled,
            "all-reduce": self.all_reduce,
        }
        return max(parts, key=parts.__getitem__)


def step_time(
    network: Mapping[str, Any],
    state: State,
    target: Target,
    *,
    batch_size: int,
    precision: str,
    sent_as: str = "float32",
) -> StepTime | None:
    """The time of a step whose device has `batch_size` images; None if the table lacks a number.

    Args:
      network: arguments of ViT, with `remat`.
      state: of memory.count_state.
      precision: of activations.
      sent_as: dtype in which gradients travel, "float32" or "bfloat16".
    """
    device = target.device
    peak = device.peak(precision)
    if not (peak and device.bandwidth and (target.link or target.num_devices == 1)):
        return None
    flops = batch_size * remat_flops(network, state.trained)
    kept, others = (
        activation_bytes(
            {**network, "remat": "none", **without},
            state.trained,
            batch_size=batch_size,
            precision=precision,
        )
        # In blocks of keys attention's weights are not kept.
        for without in ({}, {"attention_block": 1})
    )
    # The update reads weight, gradient and slots, and writes all but the gradient; the gradient
    # was written before.
    update = 2 * (state.weights + state.gradients + state.optimizer + state.average)
    least = _LEAST_TRAFFIC * kept + update
    moved = _COMPILED_TRAFFIC * others + (kept - others)
    compiled = _REMAT_TRAFFIC[network["remat"]] * moved + update
    all_reduce = 0.0
    if target.num_devices > 1 and target.link:
        # A ring sends and receives 2 (n - 1) / n of the gradients. Over several hosts as well: with
        # one ring for each card of a host they share its network, and each has its part of them.
        share = 2 * (target.num_devices - 1) / target.num_devices
        sent = state.gradients / (2 if sent_as == "bfloat16" else 1)
        all_reduce = share * sent / (target.link * 1e9)
    bandwidth = device.bandwidth * 1e9
    return StepTime(
        flops / peak, least / bandwidth, compiled / bandwidth, all_reduce, target.kind == "CPU"
    )
