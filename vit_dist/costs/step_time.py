"""How long a training step takes: the least that is possible, and what is to be expected.

The least is the roofline model (Williams et al., CACM 52, 2009): a device is busy for the longer of
operations / peak and bytes / bandwidth, here with the sum of gradients over the links beside them.
Each kept activation is written once and read twice at least (by the next layer, by the backward
pass), and the update reads and writes the state once.

What is to be expected follows a rule for each kind of device, fitted to steps that were measured or
compiled: a share of the time of all operations at the peak, and so many passes over what the step
keeps, at the speed of the memory. A pass stands for all that goes by elements, such as norms, GELU,
softmax and copies of layouts, wherever a program does it: on the chip or through its memory.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from vit_dist.costs.flops import count_tokens, remat_flops
from vit_dist.costs.memory import State, activation_bytes
from vit_dist.costs.targets import Target

_LEAST_TRAFFIC = 3


class _Rule(NamedTuple):
    """Seconds of a step on one device: what each second or byte of the least adds to it.

    Attributes:
      operations: of the time that matrix products take at the peak, the share that is not hidden.
      kept: passes over the activations that are kept, attention's weights aside, as on a TPU.
      attention: passes over attention's weights.
      spilled: passes more over both, where a tensor is too large for the memory on the chip.
      parameters: passes over the weights that the update changes.
      state: passes over all state that the update reads and writes, where `parameters` is 0.
    """

    operations: float
    kept: float
    attention: float
    spilled: float
    parameters: float
    state: float


# tests/costs/test_step_time.py holds the rules to these steps; docs/plan.md shows them.
_RULES = {
    # Cycles that libtpu's compiler tells for a v5e, of ten steps: Ti/16, S/16 and B/16 at 224 px
    # with 32 images, with and without remat; Ti/16 and S/16 with 128; B/16 at 384 px with 32, L/16
    # with 8. Within 12 %.
    "TPU": _Rule(0.372, kept=8.5, attention=8.5, spilled=5.1, parameters=13.0, state=0),
    # Of an H200: Ti/16, S/16 and B/16 at 224 px as TensorFlow ran them, within 13 %; attention's
    # share from B/16 at 384 px under JAX, which took 0.77 to 0.91 of TensorFlow's time.
    "GPU": _Rule(0.55, kept=26.9, attention=12.0, spilled=0, parameters=0, state=1),
    # Of two cores of an EPYC, which do one after the other: 0.77 to 0.79 of what was measured.
    "CPU": _Rule(1.0, kept=18, attention=1, spilled=0, parameters=0, state=1),
}
# Bytes of a tensor that stays on the chip. A v5e has 128 MB there for what an operation reads and
# writes: with tensors of 38 MB Ti/16 moves each activation twice, with 77 MB S/16 five times.
_ON_CHIP = 45e6


class StepTime(NamedTuple):
    """Seconds of a step on one device, by what takes them.

    Attributes:
      compute: products of matrices at the device's peak.
      least_traffic: its memory's traffic, were each activation moved as seldom as can be.
      operations, passes: what is to be expected of matrix products and of all else, see the module.
      all_reduce: the sum of gradients over all devices, were nothing else computed meanwhile.
      all_gather: of the new weights, which each device has a part of where the state is sharded.
    """

    compute: float
    least_traffic: float
    operations: float
    passes: float
    all_reduce: float
    all_gather: float

    @property
    def floor(self) -> float:
        """Nothing can be faster."""
        return max(self.compute, self.least_traffic, self.all_reduce + self.all_gather)

    @property
    def expected(self) -> float:
        """As programs of this kind of device were seen to run."""
        links = self.all_reduce + self.all_gather
        return max(self.floor, self.operations + self.passes + links)

    @property
    def binds(self) -> str:
        """What the expected time is due to."""
        parts = {
            "operations": self.operations,
            "memory traffic": self.passes,
            "all-reduce": self.all_reduce,
            "all-gather": self.all_gather,
        }
        return max(parts, key=parts.__getitem__)


def step_time(
    network: Mapping[str, Any],
    state: State,
    target: Target,
    *,
    batch_size: int,
    precision: str,
    accumulation: int = 1,
    sent_as: str = "float32",
    shard_state: bool = False,
) -> StepTime | None:
    """The time of a step whose device has `batch_size` images; None if the table lacks a number.

    Args:
      network: arguments of ViT, with `remat`.
      state: of memory.count_state.
      precision: of activations.
      accumulation: micro-batches that the images come in, one after the other.
      sent_as: dtype in which gradients travel, "float32" or "bfloat16".
      shard_state: ZeRO-1, see training.sharding.
    """
    device = target.device
    peak = device.peak(precision)
    if not (peak and device.bandwidth and (target.link or target.num_devices == 1)):
        return None
    flops = batch_size * remat_flops(network, state.trained)
    kept, attention, hidden = _activations(network, state, batch_size, precision)
    # The update reads weight, gradient and slots, and writes all but the gradient; the gradient
    # was written before.
    update = 2 * (state.weights + state.gradients + state.optimizer + state.average)
    least = kept if network["attention_block"] else kept + attention
    least = _LEAST_TRAFFIC * least + update
    rule = _RULES[target.kind]
    micro = math.ceil(batch_size / accumulation)
    spilled = rule.spilled if _largest_tensor(network, micro, precision) > _ON_CHIP else 0
    by_kept, by_attention = rule.kept + spilled, rule.attention + spilled
    # A backward pass is as long as two forward passes, so computing again adds a third.
    again = {
        "none": 0.0,
        "attention": attention * by_attention,
        "attention_mlp": attention * by_attention + hidden * by_kept,
        "full": attention * by_attention + kept * by_kept,
    }[network["remat"]]
    if network["attention_block"]:  # which computes the weights again, whatever the policy
        again = max(again, attention * by_attention)
    moved = kept * by_kept + attention * by_attention + again / 3
    moved += rule.parameters * state.gradients + rule.state * update
    all_reduce = all_gather = 0.0
    if target.num_devices > 1 and target.link:
        # A ring sends and receives 2 (n - 1) / n of the gradients. Over several hosts as well: with
        # one ring for each card of a host they share its network, and each has its part of them.
        share = 2 * (target.num_devices - 1) / target.num_devices
        sent = state.gradients / (2 if sent_as == "bfloat16" else 1)
        all_reduce = share * sent / (target.link * 1e9)
        if shard_state:
            # The weights that train, as large as gradients in float32, and by the links once.
            all_gather = share / 2 * state.gradients / (target.link * 1e9)
    bandwidth = device.bandwidth * 1e9
    return StepTime(
        compute=flops / peak,
        least_traffic=least / bandwidth,
        operations=rule.operations * flops / peak,
        passes=moved / bandwidth,
        all_reduce=all_reduce,
        all_gather=all_gather,
    )


def _largest_tensor(network: Mapping[str, Any], images: int, precision: str) -> int:
    """Bytes of the largest activation of a block: the MLP's hidden layer or attention's weights."""
    tokens = count_tokens(network).all
    keys = network["attention_block"] or tokens
    widest = max(network["mlp_dim"], network["num_heads"] * min(keys, tokens))
    return images * tokens * widest * tf.as_dtype(precision).size


def _activations(
    network: Mapping[str, Any], state: State, batch_size: int, precision: str
) -> tuple[int, int, int]:
    """Bytes that a step without remat keeps, as on a TPU: most; attention's weights; MLPs' layers.

    The last are part of the first.
    """

    def count(**changed: Any) -> int:
        return activation_bytes(
            {**network, "remat": "none", "attention_block": None, **changed},
            state.trained,
            batch_size=batch_size,
            precision=precision,
        )

    everything = count()
    # In blocks of keys attention's weights are not kept.
    kept = count(attention_block=1)
    return kept, everything - kept, everything - count(mlp_dim=0)
