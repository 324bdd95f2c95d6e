"""Which tf.distribute strategy a run uses, made from what the machine and its environment offer."""

import faulthandler
import os
import socket

import tensorflow as tf

from vit_dist.cluster.meeting import cluster_from_environment, meet

NAMES = ("auto", "single", "mirrored", "multiworker", "tpu")
_TPU_VARIABLES = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID")
_VECTOR_FLAG = "--xla_cpu_prefer_vector_width"


def check_strategy(
    *,
    name: str = "auto",
    virtual_cpus: int = 0,
    tpu: str = "",
    tpu_zone: str = "",
    tpu_project: str = "",
    timeout_seconds: float = 1800.0,
) -> None:
    """Raises ValueError for arguments of make_strategy that cannot work; touches no device."""
    if name not in NAMES:
        raise ValueError(f"strategy {name!r} is unknown; allowed: {', '.join(NAMES)}")
    if virtual_cpus < 0:
        raise ValueError(f"strategy.virtual_cpus must be 0 or more, got {virtual_cpus}")
    if name == "multiworker" and virtual_cpus > 1:
        raise ValueError(
            f"strategy 'multiworker' takes a host's CPU whole, but virtual_cpus is {virtual_cpus}; "
            "set virtual_cpus=0 and start more workers"
        )
    if name == "single" and virtual_cpus > 1:
        raise ValueError(
            f"strategy 'single' uses one device, but virtual_cpus is {virtual_cpus}; "
            "set strategy.name=mirrored, or virtual_cpus=0"
        )
    if name == "multiworker" and "TF_CONFIG" not in os.environ:
        raise ValueError(
            "strategy 'multiworker' reads the cluster from the environment variable TF_CONFIG, "
            "which is not set; start the workers with launch/workers.sh"
        )
    if name in ("auto", "multiworker") and os.environ.get("TF_CONFIG"):
        cluster_from_environment()
    if timeout_seconds <= 0:
        raise ValueError(f"strategy.timeout_seconds must be above 0, got {timeout_seconds}")
    if (tpu or tpu_zone or tpu_project) and name not in ("auto", "tpu"):
        raise ValueError(f"strategy.tpu* is set, but strategy.name is {name!r}; set it to tpu")


def resolve(name: str, tpu: str = "") -> str:
    """What "auto" stands for here: a TPU in the environment, TF_CONFIG, GPUs, else one device."""
    if name != "auto":
        return name
    if tpu or any(variable in os.environ for variable in _TPU_VARIABLES):
        return "tpu"
    if os.environ.get("TF_CONFIG"):
        return "multiworker"
    several = len(tf.config.list_physical_devices("GPU")) > 1
    return "mirrored" if several or len(tf.config.list_logical_devices("CPU")) > 1 else "single"


def make_strategy(
    *,
    name: str = "auto",
    virtual_cpus: int = 0,
    tpu: str = "",
    tpu_zone: str = "",
    tpu_project: str = "",
    timeout_seconds: float = 1800.0,
) -> tf.distribute.Strategy:
    """Makes the strategy; the first call in a process that touches devices.

    Args:
      name: one of NAMES. "auto" takes a TPU if the environment names one, else the cluster of
        TF_CONFIG, else all GPUs or virtual CPUs of this machine, else its one device.
      virtual_cpus: split the CPU into so many logical devices (and leave GPUs alone), so that
        several replicas run on any machine; 0 uses the CPU whole.
      tpu: "local" for the TPU of this VM, or a TPU's name; "" takes TPU_NAME, else "local".
      tpu_zone, tpu_project: of a named TPU.
      timeout_seconds: multiworker: after this a collective that hangs is an error.

    Raises:
      ValueError: see check_strategy; and no such device here, with what was looked for.
    """
    check_strategy(
        name=name,
        virtual_cpus=virtual_cpus,
        tpu=tpu,
        tpu_zone=tpu_zone,
        tpu_project=tpu_project,
        timeout_seconds=timeout_seconds,
    )
    _tune_xla()
    if virtual_cpus:
        _split_cpu(virtual_cpus)
    kind = resolve(name, tpu)
    if kind == "tpu":
        return _tpu_strategy(tpu, tpu_zone, tpu_project)
    if kind == "multiworker":
        return _multi_worker_strategy(timeout_seconds)
    if kind == "mirrored":
        gpus = [] if virtual_cpus else tf.config.list_logical_devices("GPU")
        devices = gpus or tf.config.list_logical_devices("CPU")[: virtual_cpus or None]
        # Virtual CPUs share one memory: a plain sum. Their collectives gain nothing there, and bind
        # a process to the first number of replicas it used. GPUs take the default, NCCL.
        reduce = None if gpus else tf.distribute.ReductionToOneDevice()
        return tf.distribute.MirroredStrategy(
            [device.name for device in devices], cross_device_ops=reduce
        )
    gpu = not virtual_cpus and tf.config.list_logical_devices("GPU")
    return tf.distribute.OneDeviceStrategy("GPU:0" if gpu else "CPU:0")


def _tune_xla() -> None:
    """Lets XLA use a CPU's whole vectors; the user's own XLA_FLAGS win.

    LLVM halves AVX-512's vectors by default, because early such processors slowed down under them;
    a step of Ti/16 takes 4 % less time with whole ones. XLA reads the variable at its first use.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _VECTOR_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{_VECTOR_FLAG}=512 {flags}".rstrip()


def _split_cpu(count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    split = tf.config.get_logical_device_configuration(cpu) or ()
    try:
        if len(split) < count:  # else whoever split it may want the rest too
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * count
            )
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:  # the process has used its devices already: fine if there are enough
        have = len(tf.config.list_logical_devices("CPU"))
        if have < count:
            raise ValueError(
                f"virtual_cpus={count} must be set before TensorFlow starts; it runs with {have}"
            ) from None


def _multi_worker_strategy(timeout_seconds: float) -> tf.distribute.Strategy:
    meet(*cluster_from_environment(), timeout_seconds=timeout_seconds)
    # For a worker that dies between the two; no thread or handler of Python's runs in there.
    faulthandler.dump_traceback_later(timeout_seconds, exit=True, file=2)
    try:
        options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=timeout_seconds)
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _tpu_strategy(tpu: str, zone: str, project: str) -> tf.distribute.Strategy:
    name = tpu or os.environ.get("TPU_NAME") or "local"
    looked = f"TPU {name!r}" + (f" in zone {zone}" if zone else "")
    looked += f" of project {project}" if project else ""
    remedy = (
        "On a Cloud TPU VM install the 'tpu' extra and set strategy.tpu=local; from elsewhere set "
        "strategy.tpu to the TPU's name with tpu_zone and tpu_project; without a TPU set "
        "strategy.name=auto."
    )
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            name, zone=zone or None, project=project or None
        )
        address = resolver.master().partition("grpc://")[2]
        if address:  # TensorFlow would call it for ever
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=30).close()
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except Exception as error:  # gRPC, HTTP, import and runtime errors alike: there is no such TPU
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"found no {looked} ({reason}). {remedy}") from None
