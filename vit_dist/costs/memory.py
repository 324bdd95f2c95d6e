"""Memory of a training step on one device, before it runs.

State is counted exactly, from the shapes of all variables. Activations are an estimate: what the
compiled step keeps of each block for the backward pass, which XLA decides. The estimate has these
terms, of what XLA keeps of Ti/16, S/16 and B/16 on a TPU v5e, as it is compiled, and on an H200
(docs/plan.md has the comparison):

    for each token and block, in the precision of activations: block input, query, key, value,
    attention's sum and the block's middle (6 D), the MLP's hidden layer before and after GELU
    (2 M; on GPUs 4 M), attention's weights (H N); and mean and variance of two norms in float32.

Norms' outputs are not kept: XLA computes them again. Shapes: B images of the micro-batch, N tokens,
D width, M hidden width of the MLP, H heads.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from vit_dist.costs.flops import block_names, count_tokens, layer_flops
from vit_dist.model.variants import as_pair
from vit_dist.model.vit import ViT, named_weights
from vit_dist.training.optimizer import Optimizer, OptimizerOptions, make_optimizer
from vit_dist.training.sharding import assign_owners

_FLOAT32 = 4
# With remat, while one block is computed again, its gradients need as much once more.
_RECOMPUTED_BLOCKS = 2
# Tensors as wide as the MLP's hidden layer that a block keeps. Four are what explains the memory of
# the programs that were compiled for an H200, and of steps on processors (benchmarks/memory.py).
_HIDDEN = {"TPU": 2, "GPU": 4, "CPU": 4}
# The batch that is used, and the one that is on its way to the device.
_BATCHES = 2


class State(NamedTuple):
    """Variables of a training, from their shapes.

    Attributes:
      parameters: number of weights.
      trained: names of the weights that train.
      weights, gradients, optimizer, average: bytes of each on a device that holds all of it.
      owned: bytes of the optimizer's slots of each weight, by the weight's name.
    """

    parameters: int
    trained: tuple[str, ...]
    weights: int
    gradients: int
    optimizer: int
    average: int
    owned: Mapping[str, int]

    @property
    def trained_parameters(self) -> int:
        """Number of weights that train."""
        return self.gradients // _FLOAT32


class StepMemory(NamedTuple):
    """Bytes on one device while a step runs; `average` is the moving average of the weights."""

    weights: int
    optimizer: int
    average: int
    batch: int
    activations: int
    gradients: int

    @property
    def total(self) -> int:
        """The most at one time: gradients come as activations go, unless they are added up."""
        return (
            self.weights
            + self.optimizer
            + self.average
            + self.batch
            + max(self.activations, self.gradients)
        )


def count_state(network: Mapping[str, Any], options: OptimizerOptions, *, ema: bool) -> State:
    """Counts a training's variables; touches no device.

    Args:
      network: arguments of ViT, as model.variants.vit_config returns them.
      options: of the optimizer.
      ema: whether a moving average of the weights is kept.

    Raises:
      ConfigError: a pattern of `options` that matches no weight.
    """
    # In a graph variables are only nodes, and nothing of this graph is ever run.
    with tf.Graph().as_default():
        model = ViT(**network, name="vit")
        model.build()
        named = named_weights(model)
        # Sharding needs devices, and which slots there are does not depend on it.
        whole = dataclasses.replace(options, shard_state=False)
        heads = network["num_heads"]
        optimizer = make_optimizer(named, whole, num_heads=heads, shapes_only=True)
        return state_of(named, optimizer, ema=ema)


def state_of(named: Mapping[str, Any], optimizer: Optimizer, *, ema: bool) -> State:
    """Counts the variables of a training that has been made.

    Args:
      named: the model's weights by name.
      optimizer: of these.
      ema: whether a moving average of the weights is kept.
    """
    slots = {k: math.prod(v.shape) * tf.as_dtype(v.dtype).size for k, v in optimizer.slots.items()}
    sizes = {name: math.prod(v.shape) for name, v in named.items()}
    owned = dict.fromkeys(optimizer.variables, 0)
    for name, size in slots.items():
        # "head/kernel/momentum" is a slot of "head/kernel".
        owned[name.rpartition("/")[0]] += size
    parameters = sum(sizes.values())
    return State(
        parameters=parameters,
        trained=tuple(optimizer.variables),
        weights=_FLOAT32 * parameters,
        gradients=_FLOAT32 * sum(sizes[name] for name in optimizer.variables),
        optimizer=sum(slots.values()),
        average=_FLOAT32 * parameters if ema else 0,
        owned=owned,
    )


def step_memory(
    network: Mapping[str, Any],
    state: State,
    *,
    batch_size: int,
    precision: str,
    accumulation: int = 1,
    num_devices: int = 1,
    shard_state: bool = False,
    kind: str = "TPU",
) -> StepMemory:
    """What one device holds while a step runs.

    Args:
      network: arguments of ViT, with `remat` and `attention_block`.
      state: of count_state.
      batch_size: images of this device.
      precision: "float32", "bfloat16" or "float16".
      accumulation: micro-batches that the device's images come in.
      num_devices, shard_state: ZeRO-1, see training.sharding; the fullest device is told.
      kind: of device: "CPU", "GPU" or "TPU".
    """
    micro = math.ceil(batch_size / accumulation)
    optimizer, weights = state.optimizer, state.weights
    if shard_state and num_devices > 1:
        sizes = {name: state.owned[name] for name in state.trained}
        loads = [0] * num_devices
        for name, owner in assign_owners(sizes, num_devices).items():
            loads[owner] += sizes[name]
        optimizer = max(loads)
        # The packs of all devices' new weights, beside the old ones.
        weights += state.gradients
    height, width = as_pair(network["image_size"])
    # uint8 pixels; labels weigh nothing beside them.
    batch = _BATCHES * batch_size * height * width * network["channels"]
    activations = activation_bytes(
        network, state.trained, batch_size=micro, precision=precision, kind=kind
    )
    if accumulation > 1:
        # The sum over micro-batches stays while the next ones are computed.
        activations += state.gradients
    return StepMemory(weights, optimizer, state.average, batch, activations, state.gradients)


def activation_bytes(
    network: Mapping[str, Any],
    trained: Any,
    *,
    batch_size: int,
    precision: str,
    kind: str = "TPU",
) -> int:
    """Bytes that a step keeps between its forward and its backward pass, about.

    Args:
      network: arguments of ViT, with `remat` and `attention_block`.
      trained: names of the weights that train: what lies before them all keeps nothing.
      batch_size: images of a micro-batch.
      precision: of activations.
      kind: of device: "CPU", "GPU" or "TPU".
    """
    entry = tf.as_dtype(precision).size
    height, width_px = as_pair(network["image_size"])
    tokens, width = count_tokens(network).all, network["width"]
    attention = 0 if network["attention_block"] else network["num_heads"] * tokens * entry
    hidden = _HIDDEN[kind] * network["mlp_dim"] * entry
    rest = 6 * width * entry + 2 * 2 * _FLOAT32
    kept, again = {
        "none": (attention + hidden + rest, 0),
        "attention": (hidden + rest, attention),
        "attention_mlp": (rest, attention + hidden),
        "full": (width * entry, attention + hidden + rest),
    }[network["remat"]]
    layers = layer_flops(network, trained=trained)
    blocks = {x.name.split("/")[0] for x in layers if x.backward} & block_names(network)
    per_token = len(blocks) * kept + (_RECOMPUTED_BLOCKS * again if blocks else 0)
    images = height * width_px * network["channels"] * entry
    # Logits and their gradient, in float32.
    logits = 2 * network["num_classes"] * _FLOAT32
    return batch_size * (tokens * per_token + images + logits)
