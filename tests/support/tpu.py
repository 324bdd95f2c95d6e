"""TPU slices on a machine without TPUs: real workers and connections, CPUs for chips."""

import contextlib
import random
import socket

import numpy as np
import tensorflow as tf
from tensorflow.python.client import session
from tensorflow.python.distribute import mirrored_strategy
from tensorflow.python.distribute.cluster_resolver import cluster_resolver
from tensorflow.python.tpu import topology as topology_lib
from tensorflow.python.tpu import tpu_strategy_util, tpu_system_metadata

from tests.support import processes
from vit_dist.cluster import strategy as strategy_lib
from vit_dist.cluster.tpu_slice import line_port

CORES = 2  # of a host


def free_ports(count):
    """Ports of TensorFlow servers, whose lines' ports are free, too."""
    found = []
    while len(found) < count:
        port = random.randint(20_000, 60_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for number in (port, line_port(port)):
                stack.enter_context(socket.create_server(("", number)))
            found.append(port)
    return found


@contextlib.contextmanager
def workers(folder, *flags):
    """Two real workers on loopback; yields them and the name of their slice."""
    ports = free_ports(2)
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                processes.Command(
                    f"--port={port}",
                    *flags,
                    module="vit_dist.tpu_worker",
                    log=folder / f"worker-{i}.log",
                )
            )
            for i, port in enumerate(ports)
        ]
        yield running, ",".join(f"grpc://127.0.0.1:{port}" for port in ports)


def topology(hosts):
    coordinates = [[[host, core, 0, 0] for core in range(CORES)] for host in range(hosts)]
    return topology_lib.Topology(
        mesh_shape=[hosts, CORES, 1, 1], device_coordinates=np.array(coordinates, np.int32)
    )


def system(hosts, job="worker"):
    """What TensorFlow would find out about a slice."""
    devices = []
    for host in range(hosts):
        place = f"/job:{job}/replica:0/task:{host}/device:"
        devices += [(f"{place}TPU:{core}", "TPU") for core in range(CORES)]
        devices += [(f"{place}CPU:0", "CPU")]
    return tpu_system_metadata.TPUSystemMetadata(
        num_cores=CORES * hosts,
        num_hosts=hosts,
        num_of_cores_per_host=CORES,
        topology=topology(hosts),
        devices=[session._DeviceAttributes(name, kind, 0, 0) for name, kind in sorted(devices)],
    )


class FakeResolver(cluster_resolver.ClusterResolver):
    """Claims hosts with two TPU cores each, and says no more than tracing asks for."""

    task_type, task_id, environment, _tpu = "worker", 0, "", ""

    def __init__(self, hosts=1):
        self._hosts = hosts

    def cluster_spec(self):
        return tf.train.ClusterSpec({})

    def master(self, *args, **kwargs):
        return ""

    def num_accelerators(self, *args, **kwargs):
        return {"TPU": CORES}

    def get_job_name(self):
        return "localhost"

    def get_tpu_system_metadata(self):
        return system(self._hosts, "localhost" if self._hosts == 1 else "worker")


def tpu_strategy(resolver, hosts):
    """A real TPUStrategy of cores that are not there: it traces, and distributes input."""
    tpu_strategy_util._INITIALIZED_TPU_SYSTEMS[resolver._tpu] = topology(hosts)
    resolver.get_tpu_system_metadata = lambda: system(hosts)
    strategy = tf.distribute.TPUStrategy(resolver)
    if hosts == 1:
        return strategy
    # Batches end on the host, as there are no cores to copy them to.
    extended = strategy.extended
    extended._device_input_worker_devices = extended._host_input_worker_devices
    return strategy


def compute_on_cpus():
    """In this process a slice's hosts compute on their CPUs: one program, a pipeline a host.

    TensorFlow takes a MirroredStrategy over devices of other processes in graph mode only, though
    it drives such devices as those of a TPUStrategy; so its check is passed by.
    """

    def make(tpu, zone, project):
        hosts = strategy_lib.find_slice("tpu", tpu)
        strategy_lib.connect_tpu(",".join(f"grpc://{host}" for host in hosts))
        cpus = [f"/job:worker/replica:0/task:{i}/device:CPU:0" for i in range(len(hosts))]
        mirrored_strategy._is_device_list_single_worker = lambda devices: True
        reduction = tf.distribute.ReductionToOneDevice()
        strategy = tf.distribute.MirroredStrategy(cpus, cross_device_ops=reduction)
        strategy.extended._input_workers_devices = tuple((cpu, (cpu,)) for cpu in cpus)
        return strategy

    strategy_lib._tpu_strategy = make
