"""The optimiser's state cut up among the replicas: ZeRO-1 (Rajbhandari et al., arXiv 1910.02054).

Each replica holds the slots of its own variables only, moves those, and hands the new weights to
the others. Whole variables are dealt out, so that a rule which needs a whole tensor (LAMB's trust
ratio, Adafactor's factors, Muon's iterations) does the same as without. tf.distribute has an
all-reduce and an all-gather in replica context but no reduce-scatter: gradients are all-reduced as
ever, and an all-gather of the weights comes on top.

Shapes: R replicas; n the most entries that one of them owns.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist.cluster.hosts import host_replicas

NOT_ON_TPUS = (
    "optimizer.shard_state is not for TPUs: their replicas all run the same program, and here each "
    "has variables of its own; set it to False"
)


@dataclasses.dataclass(frozen=True)
class Remote:
    """What stands for a slot that a replica of another host holds."""

    shape: tuple[int, ...]
    dtype: str


def deal_out(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """Deals names out to parts: the largest first, each to the part that has the least so far.

    Graham's longest processing time rule (SIAM J. Appl. Math. 17, 1969): no part gets more than
    4/3 of what the best division would give the fullest. Equal sizes go by name, so that every
    host finds the same.
    """
    loads, owners = [0] * parts, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


class Shards:
    """Which replica owns which variable, and how weights and slots travel between them.

    Args:
      strategy: whose replicas share the work: mirrored, multi-worker or a single device.
      shapes: of the variables that train, by name; float32.

    Attributes:
      owners: name -> the number of its replica, over all hosts.

    Raises:
      ValueError: on TPUs, whose replicas all run one program.
    """

    def __init__(self, strategy: tf.distribute.Strategy, shapes: Mapping[str, Sequence[int]]):
        if isinstance(strategy, tf.distribute.TPUStrategy):
            raise ValueError(NOT_ON_TPUS)
        self.strategy, self.num_parts = strategy, strategy.num_replicas_in_sync
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.sizes = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        self.owners = deal_out(self.sizes, self.num_parts)
        self.length = max(sum(self.sizes[n] for n in self.names(r)) for r in range(self.num_parts))
        local = zip(host_replicas(strategy), strategy.extended.worker_devices, strict=True)
        self.devices: dict[int, str] = dict(local)  # of this host's replicas

    def names(self, replica: int) -> list[str]:
        """The variables of a replica, in the order in which they travel."""
        return [name for name, owner in self.owners.items() if owner == replica]

    def device(self, name: str) -> str | None:
        """Where a variable's slots are; None: on another host."""
        return self.devices.get(self.owners[name])

    def pack(self, values: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """The new weights of one replica's variables, in `names`' order -> (n,), zeros behind."""
        parts = [tf.reshape(value, [-1]) for value in values.values()]
        used = sum(part.shape[0] for part in parts)
        return tf.concat([*parts, tf.zeros(self.length - used)], axis=0)

    def unpack(self, gathered: tf.Tensor) -> dict[str, tf.Tensor]:
        """What all replicas packed, (R n,) in their order -> the weights by name."""
        values = {}
        for replica in range(self.num_parts):
            begin = replica * self.length
            for name in self.names(replica):
                part = gathered[begin : begin + self.sizes[name]]
                values[name] = tf.reshape(part, self.shapes[name])
                begin += self.sizes[name]
        return values

    @property
    def on_several_hosts(self) -> bool:
        """Whether some slots are on another host, so that all hosts have to read them together."""
        return len(self.devices) < self.num_parts

    def read(self, name: str, slot: tf.Variable | Remote) -> np.ndarray:
        """A slot of variable `name`, float32, on every host; all call this in the same order."""
        if not self.on_several_hosts:
            return tf.cast(slot, tf.float32).numpy()
        shape, owner = tuple(slot.shape), self.owners[name]

        def part(context: Any) -> tf.Tensor:
            if context.replica_id_in_sync_group != owner:
                return tf.zeros(int(np.prod(shape)))
            return tf.reshape(tf.cast(slot, tf.float32), [-1])

        parts = self.strategy.experimental_distribute_values_from_function(part)
        total = self._add(parts)
        return self.strategy.experimental_local_results(total)[0].numpy().reshape(shape)

    @tf.function(reduce_retracing=True)
    def _add(self, parts: tf.Tensor) -> tf.Tensor:
        """A vector of each replica -> their sum, on each."""

        def of_replica(x: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(x))

        return self.strategy.run(of_replica, args=(parts,))
