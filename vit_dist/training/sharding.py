"""Optimizer state sharded over the replicas: ZeRO-1 (Rajbhandari et al., arXiv 1910.02054).

Each variable has one replica that owns it. A replica keeps optimizer slots only for the variables
that it owns, updates them, and sends their new weights to all replicas. Variables are never cut:
a rule that needs a whole tensor (LAMB's trust ratio, Adafactor's factors, Muon's iterations) gives
the same result as unsharded. tf.distribute has an all-reduce and an all-gather in replica context
but no reduce-scatter, so gradients are all-reduced as before, and the weights need an extra
all-gather.

Shapes: R replicas; n = number of entries of the fullest replica (all are padded to it).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist.cluster.hosts import host_replicas
from vit_dist.config.errors import ConfigError

# The message of two checks: of run.check before a device starts, and of Shards itself.
NOT_ON_TPUS = (
    "optimizer.shard_state is not for TPUs: their replicas all run the same program, and here each "
    "has variables of its own; set it to False"
)


@dataclasses.dataclass(frozen=True)
class Remote:
    """Placeholder (shape and dtype) for a slot that lives on another host."""

    shape: tuple[int, ...]
    dtype: str


def assign_owners(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """Assigns names to parts: the largest first, each to the part with the least so far.

    Graham's longest processing time rule (SIAM J. Appl. Math. 17, 1969): the fullest part is at
    most 4/3 of the optimal fullest part. Ties are broken by name, so every host computes the same
    owners.
    """
    loads, owners = [0] * parts, {}  # entries so far, by part
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


class Shards:
    """Which replica owns which variable, and how weights and slots get from one to another.

    Args:
      strategy: mirrored, multi-worker or a single device; its replicas share the slots.
      shapes: name -> shape of each variable that trains; all are float32.

    Attributes:
      owners: name of a variable -> number of the replica that owns it, counted over all hosts.

    Raises:
      ConfigError: on TPUs, whose replicas all run one program.
    """

    def __init__(self, strategy: tf.distribute.Strategy, shapes: Mapping[str, Sequence[int]]):
        if isinstance(strategy, tf.distribute.TPUStrategy):
            raise ConfigError(NOT_ON_TPUS)
        self.strategy, self.num_parts = strategy, strategy.num_replicas_in_sync
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.sizes = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        self.owners = assign_owners(self.sizes, self.num_parts)
        # An all-gather wants equal lengths, so every replica sends as much as the fullest one.
        self.padded_length = max(
            sum(self.sizes[n] for n in self.names(r)) for r in range(self.num_parts)
        )
        # Replica -> device, of this host's replicas only. TensorFlow lists worker_devices in the
        # order of the replicas' numbers, and only those of this process.
        local = zip(host_replicas(strategy), strategy.extended.worker_devices, strict=True)
        self.local_devices: dict[int, str] = dict(local)

    def names(self, replica: int) -> list[str]:
        """The variables that a replica owns, in the order in which `pack` lays them out."""
        return [name for name, owner in self.owners.items() if owner == replica]

    def device(self, name: str) -> str | None:
        """The device of a variable's slots; None if that is on another host."""
        return self.local_devices.get(self.owners[name])

    def pack(self, values: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """New weights of one replica's variables -> (n,), flattened in the order of `names`, padded
        with zeros.
        """
        parts = [tf.reshape(value, [-1]) for value in values.values()]
        used = sum(part.shape[0] for part in parts)
        return tf.concat([*parts, tf.zeros(self.padded_length - used)], axis=0)

    def unpack(self, gathered: tf.Tensor) -> dict[str, tf.Tensor]:
        """Inverse of `pack`: the concatenation of all replicas' packs, (R*n,) -> name: weight."""
        values = {}
        for replica in range(self.num_parts):
            # A replica's pack begins at a multiple of the padded length; its zeros at the end are
            # skipped by starting the next one there.
            begin = replica * self.padded_length
            for name in self.names(replica):
                part = gathered[begin : begin + self.sizes[name]]
                values[name] = tf.reshape(part, self.shapes[name])
                begin += self.sizes[name]
        return values

    @property
    def on_several_hosts(self) -> bool:
        """Whether some slots are on another host, so that `read` is a collective of all hosts."""
        return len(self.local_devices) < self.num_parts

    def read(self, name: str, slot: tf.Variable | Remote) -> np.ndarray:
        """Fetches a slot of variable `name` as float32 to every host, for a checkpoint.

        Collective: all hosts must call it, in the same order.
        """
        if not self.on_several_hosts:
            return tf.cast(slot, tf.float32).numpy()
        shape, owner = tuple(slot.shape), self.owners[name]

        def part(context: Any) -> tf.Tensor:
            if context.replica_id_in_sync_group != owner:
                return tf.zeros(int(np.prod(shape)))
            return tf.reshape(tf.cast(slot, tf.float32), [-1])

        # tf.distribute has no broadcast. The owner contributes the slot, every other replica zeros:
        # the sum is the slot, because x + 0 rounds nothing.
        parts = self.strategy.experimental_distribute_values_from_function(part)
        total = self._add(parts)
        return self.strategy.experimental_local_results(total)[0].numpy().reshape(shape)

    # Slots have many lengths: from the second one on a trace with an unknown length serves them
    # all, rather than one trace for each.
    @tf.function(autograph=False, reduce_retracing=True)
    def _add(self, parts: tf.Tensor) -> tf.Tensor:
        """All-reduce sum of one vector per replica."""

        def of_replica(x: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(x))

        return self.strategy.run(of_replica, args=(parts,))
