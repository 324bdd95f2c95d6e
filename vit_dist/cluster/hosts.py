"""The hosts of a strategy: which replicas each host feeds, and what is gathered from all hosts.

A host is a process; its replicas are the devices that it feeds. Replicas are numbered over all
hosts, those of a host being neighbours.
"""

import functools

import numpy as np
import tensorflow as tf

from vit_dist.cluster import tpu_vm


def host_replicas(strategy: tf.distribute.Strategy) -> range:
    """The numbers of the replicas that this host feeds; all hosts have equally many, in order."""
    hosts = num_hosts(strategy)
    local = strategy.num_replicas_in_sync // hosts
    index = strategy.cluster_resolver.task_id if hosts > 1 else 0
    return range(index * local, (index + 1) * local)


def replicas_of(context: tf.distribute.InputContext) -> range:
    """The numbers of the replicas that one input pipeline feeds.

    There is one pipeline for each host: each process of a MultiWorkerMirroredStrategy makes its
    own, and the program of a TPU slice makes those of all hosts.
    """
    local = context.num_replicas_in_sync // context.num_input_pipelines
    first = context.input_pipeline_id * local
    return range(first, first + local)


def remote_hosts(strategy: tf.distribute.Strategy) -> list[str]:
    """The CPU of each host of a TPU slice, whose replicas and input this process drives.

    Returns:
      Names such as "/job:worker/replica:0/task:1/device:CPU:0", in the hosts' order; none where all
      replicas belong to the process that feeds them.
    """
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return []
    specs = map(tf.DeviceSpec.from_string, strategy.extended.worker_devices)
    cpus = [s.replace(device_type="CPU", device_index=0) for s in specs]
    # TensorFlow calls devices of its own process "localhost", or leaves the job out. A server on
    # this machine is another process.
    return list(dict.fromkeys(c.to_string() for c in cpus if c.job not in (None, "localhost")))


def num_hosts(strategy: tf.distribute.Strategy) -> int:
    """How many processes run this program together (1 but for MultiWorkerMirrored)."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 1
    # strategy.py gives all hosts to TensorFlow as one job, "worker". A strategy without that job
    # was made for one process without a cluster.
    return max(len(strategy.cluster_resolver.cluster_spec().as_dict().get("worker", [])), 1)


def all_hosts(strategy: tf.distribute.Strategy, number: int) -> list[int]:
    """Gathers one int64 number from each host; a collective, which all hosts must call.

    Returns:
      The numbers in the hosts' order, the same list on every host. The call waits until all hosts
      have called it, so it is also a barrier.
    """
    return [int(n) for n in all_hosts_arrays(strategy, np.array(number, np.int64))]


def all_hosts_arrays(strategy: tf.distribute.Strategy, array: np.ndarray) -> np.ndarray:
    """Gathers an array from each host, all of one shape; a collective as `all_hosts`.

    Returns:
      (hosts, *array.shape), in the hosts' order, the same on every host.
    """
    hosts = num_hosts(strategy)
    if hosts == 1:
        return array[np.newaxis]
    gathered = _gather(strategy)(tf.constant(array[np.newaxis]))
    # Each replica of a host adds the host's array, and the replicas of a host are neighbours.
    return gathered.numpy()[:: strategy.num_replicas_in_sync // hosts]


# Cached by strategy: a new tf.function would be traced again at each call.
@functools.cache
def _gather(strategy: tf.distribute.Strategy):
    # In a tf.function, because TensorFlow warns at each eager all-gather that it is slow.
    @tf.function(autograph=False)
    def gather(array: tf.Tensor) -> tf.Tensor:
        def of_replica(array: tf.Tensor) -> tf.Tensor:
            return tf.distribute.get_replica_context().all_gather(tf.identity(array), axis=0)

        gathered = strategy.run(of_replica, args=(array,))
        # Each replica holds what all hosts gave, so the first one of this host will do.
        return strategy.experimental_local_results(gathered)[0]

    return gather


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes files and prints."""
    return host_replicas(strategy).start == 0


def device_kind(strategy: tf.distribute.Strategy) -> str:
    """ "CPU", "GPU" or "TPU": what the replicas run on."""
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return "TPU"
    # All replicas of a strategy run on one kind of device, so the first tells.
    device = strategy.extended.worker_devices[0]
    return tf.DeviceSpec.from_string(device).device_type or "CPU"


def device_name(strategy: tf.distribute.Strategy) -> str:
    """What the first device calls itself: "NVIDIA A100-SXM4-40GB", "TPU v5litepod-16".

    "CPU" for CPUs, and "" where nobody tells.
    """
    kind = device_kind(strategy)
    if kind == "TPU":
        vm = tpu_vm.found().vm
        return f"TPU {vm.kind}" if vm and vm.kind else ""
    if kind == "GPU":
        gpus = tf.config.get_visible_devices("GPU")
        details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
        # A driver need not tell a name. "" is no device of costs.devices: then no MFU is shown.
        return details.get("device_name", "")
    return kind


def describe(strategy: tf.distribute.Strategy, *, batch_size: int, accumulation: int = 1) -> str:
    """One line: strategy, hosts, replicas, kind of device, and how the batch is cut up."""
    replicas = strategy.num_replicas_in_sync
    share = batch_size // replicas
    # TensorFlow's class has an older name than the one that its users know.
    name = type(strategy).__name__.replace("CollectiveAllReduce", "MultiWorkerMirrored")
    # The hosts of a TPU slice run one program.
    hosts = len(remote_hosts(strategy)) or num_hosts(strategy)
    text = (
        f"{name}: {hosts} host(s), {replicas} replica(s) on "
        f"{device_kind(strategy)}, batch {batch_size} = {replicas} x {share}"
    )
    return text + (f", in {accumulation} micro-batches each" if accumulation > 1 else "")
