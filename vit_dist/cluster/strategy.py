"""Chooses and makes a run's tf.distribute strategy, from the devices and the environment."""

import faulthandler
import os
import socket

import tensorflow as tf
from absl import logging

from vit_dist.cluster import gpus, tpu_vm
from vit_dist.cluster.addresses import address_problem, split_address
from vit_dist.cluster.environment import Cluster, find_cluster
from vit_dist.cluster.hosts import device_kind
from vit_dist.cluster.slurm import share_of_gpus
from vit_dist.cluster.tpu_probe import reason_of
from vit_dist.config.errors import ConfigError

NAMES = ("auto", "single", "mirrored", "multiworker", "tpu", "local")
# Environment variables of TPU hosts; any of them makes "auto" take the TPU.
_TPU_VARIABLES = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
_GRPC = "grpc://"  # begins the address of a TensorFlow server
_TPU_REMEDY = (
    "On a Cloud TPU VM install the 'tpu' extra and set strategy.tpu=local; from elsewhere set "
    "strategy.tpu to the TPU's name with tpu_zone and tpu_project; without a TPU set "
    "strategy.name=auto."
)
_VECTOR_FLAG = "--xla_cpu_prefer_vector_width"


def check_strategy(
    *,
    name: str = "auto",
    virtual_cpus: int = 0,
    min_devices: int = 0,
    tpu: str = "",
    tpu_zone: str = "",
    tpu_project: str = "",
    timeout_seconds: float = 1800.0,
    patience_seconds: float = 600.0,
    deterministic: bool = False,
) -> None:
    """Raises ConfigError for arguments of make_strategy that cannot work; touches no device."""
    if name not in NAMES:
        raise ConfigError(f"strategy {name!r} is unknown; allowed: {', '.join(NAMES)}")
    if virtual_cpus < 0:
        raise ConfigError(f"strategy.virtual_cpus must be 0 or more, got {virtual_cpus}")
    if min_devices < 0:
        raise ConfigError(f"strategy.min_devices must be 0 or more, got {min_devices}")
    if name == "multiworker" and virtual_cpus > 1:
        raise ConfigError(
            f"strategy 'multiworker' takes a host's CPU whole, but virtual_cpus is {virtual_cpus}; "
            "set virtual_cpus=0 and start more workers"
        )
    if name == "single" and virtual_cpus > 1:
        raise ConfigError(
            f"strategy 'single' uses one device, but virtual_cpus is {virtual_cpus}; "
            "set strategy.name=mirrored, or virtual_cpus=0"
        )
    for key, value in {"timeout": timeout_seconds, "patience": patience_seconds}.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"strategy.{key}_seconds must be above 0, got {value}")
    if deterministic and gpus.count_device_files() and not gpus.is_known(tf.__version__):
        raise ConfigError(
            "strategy.deterministic sets a flag of XLA, which is known for TensorFlow "
            f"{' and '.join(gpus.KNOWN_TO)}; this is {tf.__version__}: set XLA_FLAGS yourself, and "
            "strategy.deterministic=False"
        )
    if (tpu or tpu_zone or tpu_project) and name not in ("auto", "tpu"):
        raise ConfigError(f"strategy.tpu* is set, but strategy.name is {name!r}; set it to tpu")
    cluster = choose_cluster(name, tpu)
    if name == "auto" and virtual_cpus > 1 and cluster:
        raise ConfigError(
            f"virtual_cpus is {virtual_cpus}, but {cluster.engine} says that this is one of "
            f"{len(cluster.workers)} hosts: set virtual_cpus=0, or strategy.name=local to train on "
            "this machine alone"
        )
    if not cluster:
        find_slice(name, tpu)
        _check_tpu(name, tpu)


def choose_cluster(name: str = "auto", tpu: str = "") -> Cluster | None:
    """The hosts that train together, or None for a run of this process alone; touches no device.

    Raises:
      ConfigError: strategy "multiworker" without hosts, or an environment that contradicts itself
        or that says that there are other hosts but not where.
    """
    if name == "multiworker":
        cluster = find_cluster()
        if cluster is None:
            state = "names no hosts" if os.environ.get("TF_CONFIG") else "is not set"
            raise ConfigError(
                "strategy 'multiworker' reads the cluster from the environment variable TF_CONFIG, "
                f"which {state}; start the workers with launch/workers.sh, or under a scheduler "
                "that docs/clusters.md lists"
            )
        return cluster
    if name != "auto" or _takes_tpu(name, tpu):
        return None
    cluster = find_cluster()
    return cluster if cluster and len(cluster.workers) > 1 else None


def _takes_tpu(name: str, tpu: str) -> bool:
    """Whether a strategy of this name is a TPU's, by the arguments and the environment alone."""
    named = tpu or tpu_vm.found().vm or any(v in os.environ for v in _TPU_VARIABLES)
    return name == "tpu" or (name == "auto" and bool(named))


def find_slice(name: str = "auto", tpu: str = "") -> tuple[str, ...]:
    """The hosts of the TPU slice that a run uses; none for a TPU of one host, and without a TPU.

    Args:
      name: of the strategy.
      tpu: "local" or "" for the slice that this machine belongs to, or the addresses of its
        workers: "grpc://host0:8470,grpc://host1:8470".

    Returns:
      "host:port" of each host's TensorFlow server, in the slice's order.

    Raises:
      ConfigError: addresses that cannot be, variables that contradict each other, or this is a host
        of a slice on which no program runs.
    """
    if not _takes_tpu(name, tpu):
        return ()
    which = tpu or os.environ.get("TPU_NAME") or "local"
    if which.startswith(_GRPC):
        addresses = tuple(part.strip().removeprefix(_GRPC) for part in which.split(","))
        problem = address_problem(addresses)
        if problem:
            raise ConfigError(f"strategy.tpu {which!r} names the hosts of a TPU slice: {problem}")
        return addresses if len(addresses) > 1 else ()
    # A container of GKE is told by variables, also where this TensorFlow cannot use TPUs.
    vm = tpu_vm.found().vm
    if vm is None and "TPU_WORKER_HOSTNAMES" in os.environ:
        vm = tpu_vm.find_tpu_vm()
    if vm is None or len(vm.hosts) < 2 or which != "local":
        return ()
    problem = tpu_vm.problem_of_place(vm)
    if problem:
        raise ConfigError(problem)
    return vm.addresses


def _check_tpu(name: str, tpu: str) -> None:
    """Raises ConfigError where TensorFlow was told to leave the TPU of this machine alone."""
    problem = tpu_vm.found().problem
    which = tpu or os.environ.get("TPU_NAME") or "local"
    if problem is not None and which == "local" and _takes_tpu(name, tpu):
        raise ConfigError(f"found no TPU 'local' ({problem}). {_TPU_REMEDY}")


def resolve(name: str, tpu: str = "") -> str:
    """What "auto" and "local" stand for here: one of the other names. May start the devices."""
    if name not in ("auto", "local"):
        return name
    if _takes_tpu(name, tpu):
        return "tpu"
    if choose_cluster(name, tpu):
        return "multiworker"
    # Virtual CPUs are logical devices of one physical CPU. Listing them starts the devices.
    several = len(tf.config.list_physical_devices("GPU")) > 1
    return "mirrored" if several or len(tf.config.list_logical_devices("CPU")) > 1 else "single"


def make_strategy(
    *,
    name: str = "auto",
    virtual_cpus: int = 0,
    min_devices: int = 0,
    tpu: str = "",
    tpu_zone: str = "",
    tpu_project: str = "",
    timeout_seconds: float = 1800.0,
    patience_seconds: float = 600.0,
    deterministic: bool = False,
) -> tf.distribute.Strategy:
    """Makes the strategy; the first call in a process that touches devices.

    The hosts of a cluster must have met before (see meeting.meet): TensorFlow would wait for an
    absent host without end.

    Args:
      name: one of NAMES. "auto" takes a TPU if the environment names one, else the cluster that it
        describes (environment.ENGINES), else what "local" takes: all GPUs or virtual CPUs of this
        machine, else its one device.
      virtual_cpus: splits the CPU into so many logical devices and uses no GPU, so that several
        replicas run on any machine; 0 uses the CPU whole.
      min_devices: refuse to start with fewer replicas, over all hosts.
      tpu: "local" for the TPU of this VM, or a TPU's name; "" takes TPU_NAME, else "local".
      tpu_zone, tpu_project: of a named TPU.
      timeout_seconds: for several hosts: the longest wait for others; at least 120 s are waited.
      patience_seconds: of the watchdog, see watchdog.Limits; only checked here.
      deterministic: what XLA compiles for GPUs gives the same bits at each start; without effect on
        CPUs and TPUs, where it does so in any case.

    Raises:
      ConfigError: see check_strategy; also if there is no such device, with what was looked for.
    """
    check_strategy(
        name=name,
        virtual_cpus=virtual_cpus,
        min_devices=min_devices,
        tpu=tpu,
        tpu_zone=tpu_zone,
        tpu_project=tpu_project,
        timeout_seconds=timeout_seconds,
        patience_seconds=patience_seconds,
        deterministic=deterministic,
    )
    # All before resolve(), which starts the devices: afterwards they cannot be configured.
    found = gpus.Found() if virtual_cpus or _takes_tpu(name, tpu) else gpus.look()
    several = found.device_files > 1 or choose_cluster(name, tpu) is not None
    _tune_xla(found, several=several, deterministic=deterministic)
    if virtual_cpus:
        _split_cpu(virtual_cpus)
    kind = resolve(name, tpu)
    # Before a model is made, because some of these problems crash TensorFlow at its first kernel.
    if tf.config.list_physical_devices("GPU"):
        for problem in gpus.problems(found, tf.sysconfig.get_build_info()):
            logging.warning("%s", problem)
    if kind == "tpu":
        strategy = _tpu_strategy(tpu, tpu_zone, tpu_project)
    elif kind == "multiworker":
        cluster = choose_cluster(name, tpu)
        assert cluster is not None, "resolve() found one"
        strategy = _multi_worker_strategy(cluster, timeout_seconds)
    elif kind == "mirrored":
        strategy = _mirrored_strategy(virtual_cpus)
    else:
        gpu = not virtual_cpus and tf.config.list_logical_devices("GPU")
        strategy = tf.distribute.OneDeviceStrategy("GPU:0" if gpu else "CPU:0")
    if strategy.num_replicas_in_sync < min_devices:
        raise ConfigError(
            f"strategy.min_devices is {min_devices}, but this run would have "
            f"{strategy.num_replicas_in_sync} replica(s) on {device_kind(strategy)}: "
            + ("; ".join(device_warnings(strategy)) or "lower it, or add hosts or devices")
        )
    return strategy


def device_warnings(strategy: tf.distribute.Strategy) -> list[str]:
    """One line if a GPU seems to be there and the run is on the CPU; starts no device."""
    # TensorFlow sees the GPU, and virtual_cpus is set: the CPU was asked for.
    if device_kind(strategy) != "CPU" or tf.config.list_physical_devices("GPU"):
        return []
    found = gpus.look()
    # NVIDIA's wheels (the extra `gpu`) or a driver's device file: somebody expects a GPU to work.
    if found.hidden or not (found.wheels or found.device_files):
        return []
    why = gpus.why_unseen(found, tf.sysconfig.get_build_info())
    return [
        "training on the CPU: NVIDIA's libraries or a GPU are installed, but TensorFlow sees no "
        f"GPU: {why} (strategy.min_devices refuses to start without)"
    ]


def _mirrored_strategy(virtual_cpus: int) -> tf.distribute.Strategy:
    cards = [] if virtual_cpus else tf.config.list_logical_devices("GPU")
    devices = cards or tf.config.list_logical_devices("CPU")[: virtual_cpus or None]
    # Virtual CPUs share one memory, so a plain sum is enough. Collectives would gain nothing, and
    # would bind the process to the number of replicas that it used first. GPUs take NCCL, which is
    # the default.
    reduce = None if cards else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(
        [device.name for device in devices], cross_device_ops=reduce
    )


def _tune_xla(found: gpus.Found, *, several: bool, deterministic: bool) -> None:
    """Sets XLA's flags for the devices of this machine; one that XLA_FLAGS has already wins.

    LLVM uses half of AVX-512's width by default, because early processors with it ran slower under
    full load; a step of Ti/16 takes 4 % less time at full width. XLA reads the variable when it is
    first used.

    Args:
      found: the GPUs; those flags are left alone where there are none.
      several: whether there are several replicas.
      deterministic: see make_strategy.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = {} if _VECTOR_FLAG in flags else {_VECTOR_FLAG: "512"}
    if found.device_files and not found.hidden:
        root, version = found.cuda_root, tf.__version__
        wanted |= gpus.xla_flags(
            flags,
            cuda_root=root,
            several=several,
            deterministic=deterministic,
            tensorflow=version,
        )
    added = " ".join(f"{name}={value}" for name, value in wanted.items())
    os.environ["XLA_FLAGS"] = f"{added} {flags}".strip()


def _split_cpu(count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    split = tf.config.get_logical_device_configuration(cpu) or ()
    try:
        # Split into more already, as by a test or a notebook: the rest may be in use there.
        if len(split) < count:
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * count
            )
        tf.config.set_visible_devices([], "GPU")
    # TensorFlow's devices have been started already. That is fine if there are enough of them.
    except RuntimeError:
        have = len(tf.config.list_logical_devices("CPU"))
        if have < count:
            raise ConfigError(
                f"virtual_cpus={count} must be set before TensorFlow starts; it runs with {have}"
            ) from None


def _take_own_gpus(cluster: Cluster) -> None:
    """Leaves the GPUs of the other tasks of a node to them, where Slurm shows all to each."""
    cards = tf.config.get_visible_devices("GPU")
    own = share_of_gpus(len(cards), os.environ) if cluster.engine == "Slurm" else None
    if own is not None:
        tf.config.set_visible_devices([cards[i] for i in own], "GPU")
        text = "Slurm shows all %d GPUs to each task of this node: this one takes number %s"
        logging.info(text, len(cards), ", ".join(map(str, own)))


def _multi_worker_strategy(cluster: Cluster, timeout_seconds: float) -> tf.distribute.Strategy:
    _take_own_gpus(cluster)
    cards = tf.config.get_visible_devices("GPU")
    # "AUTO" is TensorFlow's own ring of gRPC messages, also where all hosts have GPUs: its resolver
    # of collectives takes NCCL only where the hint is NCCL (collective_param_resolver_local.cc).
    transport = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=transport.NCCL if cards else transport.AUTO
    )
    # One job for all hosts, whatever the engine calls them, so that a host has one number.
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.workers)}),
        task_type="worker",
        task_id=cluster.index,
        rpc_layer="grpc",
        num_accelerators={"GPU": len(cards)},
    )
    # TensorFlow connects to all hosts in here and holds Python's lock all the while: no thread or
    # signal handler of Python's runs until they answer. Should one of them die now, the C thread of
    # faulthandler ends this process instead. CommunicationOptions(timeout_seconds=...) is no way
    # out: TensorFlow starts a thread at each collective that sleeps for so long.
    faulthandler.dump_traceback_later(max(timeout_seconds, 120), exit=True, file=2)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(
            cluster_resolver=resolver, communication_options=options
        )
    finally:
        faulthandler.cancel_dump_traceback_later()


def _tpu_strategy(tpu: str, zone: str, project: str) -> tf.distribute.Strategy:
    hosts = find_slice("tpu", tpu)
    name = tpu or os.environ.get("TPU_NAME") or "local"
    looked = f"TPU {name!r}" + (f" in zone {zone}" if zone else "")
    looked += f" of project {project}" if project else ""
    if hosts:
        name = ",".join(_GRPC + host for host in hosts)
    try:
        resolver = connect_tpu(name, zone, project)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    # gRPC, HTTP, import and runtime errors: each means that no TPU can be used.
    except Exception as error:
        reason = reason_of(str(error)) or type(error).__name__
        raise ConfigError(f"found no {looked} ({reason}). {_TPU_REMEDY}") from None


def connect_tpu(
    name: str, zone: str = "", project: str = ""
) -> tf.distribute.cluster_resolver.TPUClusterResolver:
    """Connects this process to the TensorFlow servers of a TPU; to none for "local".

    Args:
      name: "local", a TPU's name, or the addresses of its hosts: "grpc://a:8470,grpc://b:8470".
      zone: of a TPU by name.
      project: of a TPU by name.
    """
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
        name, zone=zone or None, project=project or None
    )
    # A TPU on other machines: TensorFlow would try to reach an absent one for ever, so plain
    # connections are tried first. An address may be IPv6, [::1]:8470.
    for addresses in resolver.cluster_spec().as_dict().values():
        for address in addresses:
            socket.create_connection(split_address(address), timeout=30).close()
    # TensorFlow logs its settings of the connection, twenty lines, as a notice.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        tf.config.experimental_connect_to_cluster(resolver)
    finally:
        logging.set_verbosity(verbosity)
    return resolver
