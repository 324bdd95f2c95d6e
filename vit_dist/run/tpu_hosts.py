"""The hosts of a TPU slice in a run: met before it begins, watched, and reading the same data."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist.cluster import metadata, tpu_vm
from vit_dist.cluster.hosts import remote_hosts
from vit_dist.cluster.strategy import find_slice
from vit_dist.cluster.tpu_slice import Slice, open_slice
from vit_dist.config.errors import DataError
from vit_dist.data.damage import message_of
from vit_dist.data.sources.source import Source
from vit_dist.run.facts import code_facts

_LOCAL = "/job:localhost/replica:0/task:0/device:CPU:0"  # this process, on a slice's host 0
_SAMPLES = 4  # examples of a split that every host reads at the start
_SAME = "The data must have the same path on every host: in a bucket, or on a disk that all see"


@contextlib.contextmanager
def tpu_hosts(devices: Mapping[str, Any], asked: Callable[[str], None]) -> Iterator[Slice]:
    """The lines to the hosts of the run's TPU slice; without one, lines to nobody.

    Within it notices of maintenance of this TPU machine are heard as well.

    Args:
      devices: the arguments of make_strategy.
      asked: called by a thread, with the reason, when a host is asked to stop.

    Raises:
      HostLostError: a host's worker does not come.
      ConfigError: a host has other versions.
    """
    addresses = find_slice(devices["name"], devices["tpu"])
    vm = tpu_vm.found().vm
    with contextlib.ExitStack() as stack:
        if vm is not None and vm.has_metadata and not addresses:
            stack.enter_context(metadata.watch(asked))
        timeout = devices["timeout_seconds"]
        facts = code_facts() if addresses else {}
        yield stack.enter_context(
            open_slice(addresses, facts=facts, timeout_seconds=timeout, asked=asked)
        )


def check_reading(
    sources: Mapping[str, Source], strategy: tf.distribute.Strategy, addresses: Sequence[str]
) -> None:
    """Checks, with a few examples, that all hosts of a slice read what this process reads.

    Args:
      sources: the splits that will be read.
      strategy: the run's; without other hosts nothing is checked.
      addresses: of the hosts, for messages.

    Raises:
      DataError: a host cannot read an example, or reads another one; names both.
    """
    cpus = remote_hosts(strategy)
    for source in sources.values() if cpus else ():
        source.prepare()
        here = _read(source, _LOCAL)
        for i, cpu in enumerate(cpus):
            name = f"TPU host {i} ({addresses[i]})"
            try:
                there = _read(source, cpu)
            except tf.errors.OpError as error:
                raise DataError(
                    f"{name} cannot read {source}, which this process can: {message_of(error)}. "
                    f"{_SAME}"
                ) from None
            for one, other in zip(here, there, strict=True):
                if any(not np.array_equal(one[key], other[key]) for key in one):
                    raise DataError(f"{name} reads other examples of {source}. {_SAME}")


def _read(source: Source, device: str) -> list[dict[str, np.ndarray]]:
    """Some examples of a source, raw, as a device's host reads them."""
    with tf.device(device):
        if source.indexable:
            last = source.num_examples - 1
            indices = sorted({i * last // (_SAMPLES - 1) for i in range(_SAMPLES)})
            examples = [source.read(tf.constant(i, tf.int64)) for i in indices]
        else:
            # A stream is read from its beginning; its end would be an error on the other host.
            stream = source.stream(seed=None, epoch=0).repeat()
            records = [next(iter(stream))]
            own = [{k: v for k, v in record.items() if k != "index"} for record in records]
            examples = [source.decode_record(record) for record in own]
        return [{key: value.numpy() for key, value in example.items()} for example in examples]
