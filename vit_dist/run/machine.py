"""What the doctor looks at: software, cards, links, collectives, XLA, a step's numbers, speed.

Each function returns one line for a person where all is well, and raises WrongError, or what
TensorFlow raises, where it is not. They use what a training uses: its strategy, model and step.
"""

import dataclasses
import importlib.metadata
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import vit_dist
from vit_dist.cluster import gpus
from vit_dist.cluster.agreement import Meeting, flatten
from vit_dist.cluster.hosts import all_hosts, describe, device_kind, host_replicas
from vit_dist.cluster.links import measure_links
from vit_dist.cluster.strategy import device_warnings
from vit_dist.run.build import make_state, make_step
from vit_dist.run.facts import machine_facts
from vit_dist.run.forecast import fit_remat
from vit_dist.run.health import WrongError
from vit_dist.run.options import Data, RunOptions
from vit_dist.training.step import compiled

# Releases of TensorFlow that the extras of pyproject.toml allow.
_RELEASES = ("2.20", "2.21")
# MiB of a card that its driver may take for itself.
_DRIVER_MIB = 2048
_MIB = 2**20

# Largest relative error of a result: of one rounding of what a product multiplies, by kind of
# device and dtype. GPUs since Ampere round float32 to TF32's 10 bits, TPUs to bfloat16's 7.
_UNIT = {"CPU": 2.0**-24, "GPU": 2.0**-11, "TPU": 2.0**-8}
# Products that follow on each other in the step that is compared: two blocks with six each, patches
# and head, forwards and backwards. The errors of products add up at worst.
_PRODUCTS = 2 * (2 * 6 + 2)
# Sums of up to 2^14 terms in float32, in an order of the device's own; they grow with the square
# root of the number of terms.
_SUMS = 2.0**7 * 2.0**-24
_STEPS = 3  # that are compared


def versions() -> str:
    """The software, and whether it goes together."""
    installed = {}
    for name in ("tensorflow", "tensorflow-tpu", "libtpu", "nvidia-cudnn-cu12", "nvidia-nccl-cu12"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if {"tensorflow", "tensorflow-tpu"} <= set(installed):
        raise WrongError(
            "tensorflow and tensorflow-tpu are both installed, and overwrite each other's files: "
            "make a new environment with one of the extras cpu, gpu and tpu"
        )
    if not tf.__version__.startswith(tuple(f"{release}." for release in _RELEASES)):
        raise WrongError(
            f"TensorFlow is {tf.__version__}, and vit_dist {vit_dist.__version__} was made for "
            f"{' and '.join(_RELEASES)}: pip install -e '.[cpu]', '.[gpu]' or '.[tpu]'"
        )
    more = [f"{k} {v}" for k, v in installed.items() if k != "tensorflow"]
    words = [
        f"vit_dist {vit_dist.__version__}",
        f"Python {platform.python_version()}",
        f"TensorFlow {tf.__version__}",
        f"Keras {keras.__version__}",
        f"NumPy {np.__version__}",
    ]
    return ", ".join([*words, *more])


def cards(found: gpus.Found) -> str:
    """NVIDIA's cards, and what stands in the way of using them."""
    wrong = gpus.problems(found, tf.sysconfig.get_build_info())
    wrong += [
        f"{card.used} of {card.memory} MiB of card {card.number} ({card.name}) are taken by other "
        "processes: end them (nvidia-smi lists them), or leave it out with CUDA_VISIBLE_DEVICES"
        for card in found.cards
        if card.used > _DRIVER_MIB
    ]
    if wrong:
        raise WrongError("; ".join(wrong))
    if not found.cards:
        return "CUDA_VISIBLE_DEVICES hides them" if found.hidden else "none"
    named = [f"{c.name} {c.memory / 1024:.0f} GiB" for c in found.cards]
    counts = ", ".join(f"{named.count(name)} x {name}" for name in dict.fromkeys(named))
    return f"{counts}, driver {found.cards[0].driver}, CUDA's compiler in {found.cuda_root}"


def links(meeting: Meeting, *, timeout_seconds: float, num_bytes: int = 2**24) -> str:
    """Whether this host reaches all others, and how fast."""
    found = measure_links(meeting, timeout_seconds=timeout_seconds, num_bytes=num_bytes)
    wrong = [f"to {meeting.name(link.host)}: {link.wrong}" for link in found if link.wrong]
    if wrong:
        raise WrongError("; ".join(wrong))
    if not found:
        return "one host"
    shown = [
        f"{meeting.name(link.host)} {1e3 * link.seconds:.2f} ms, {link.rate / 1e6:.0f} MB/s"
        for link in found
    ]
    return "from this host to " + "; ".join(shown)


def alike(meeting: Meeting) -> str:
    """Whether all hosts have the same code, versions and kind of devices."""
    facts = machine_facts()
    # Not by agree(): that ends all hosts where they differ, and here the report goes on.
    flat = meeting.gather(flatten(facts))
    if any(other != flat[0] for other in flat):
        raise WrongError(meeting.describe(dict(enumerate(flat))))
    kind, number = facts["devices"]["kind"], facts["devices"]["number"]
    return f"the same code and versions, {number} {kind}(s) on each host"


def devices(strategy: tf.distribute.Strategy) -> str:
    """What the strategy runs on."""
    wrong = device_warnings(strategy)
    if wrong:
        raise WrongError("; ".join(wrong))
    return describe(strategy, batch_size=strategy.num_replicas_in_sync).rpartition(", batch")[0]


def collectives(strategy: tf.distribute.Strategy, *, num_bytes: int) -> str:
    """An all-reduce of known numbers over all replicas, and its speed."""
    replicas = strategy.num_replicas_in_sync
    hosts = all_hosts(strategy, host_replicas(strategy).start)
    expected = [i * (replicas // len(hosts)) for i in range(len(hosts))]
    if hosts != expected:
        raise WrongError(
            f"hosts gathered {hosts} in place of {expected}: do not trust this cluster"
        )
    count = num_bytes // 4
    # Small whole numbers, so that their sums are exact in any order.
    pattern = np.arange(count) % 7

    @tf.function(autograph=False)
    def total() -> tf.Tensor:
        def of_replica() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            number = tf.cast(context.replica_id_in_sync_group, tf.float32) + 1
            same = tf.cast(tf.range(count) % 7, tf.float32)
            return context.all_reduce(tf.distribute.ReduceOp.SUM, number * same)

        return strategy.experimental_local_results(strategy.run(of_replica))

    expected_sum = (pattern * (replicas * (replicas + 1) // 2)).astype(np.float32)
    for i, value in zip(host_replicas(strategy), total(), strict=True):
        bad = np.flatnonzero(value.numpy() != expected_sum)
        if len(bad):
            raise WrongError(
                f"replica {i} has a wrong sum over {replicas} replicas: entry {bad[0]} is "
                f"{value.numpy()[bad[0]]:g} in place of {expected_sum[bad[0]]:g} ({len(bad)} of "
                f"{len(pattern)} are wrong): do not train on these devices. On GPUs try "
                "NCCL_P2P_DISABLE=1, and look at the system's log"
            )
    if replicas == 1:
        return "one replica, nothing to sum"
    seconds = _shortest(lambda: [value[0].numpy() for value in total()])
    # NCCL's "bus bandwidth": what each link carries in a ring.
    rate = 2 * (replicas - 1) / replicas * num_bytes / seconds
    return (
        f"{replicas} replicas agree on known sums; {num_bytes / _MIB:.0f} MiB take "
        f"{1e3 * seconds:.1f} ms, {rate / 1e9:.2f} GB/s a link"
    )


def compiles(strategy: tf.distribute.Strategy) -> str:
    """Whether XLA compiles for these devices, and computes what NumPy does."""
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) / 8

    # Of mathematical functions, which on GPUs are in libdevice, and a product.
    def formula(x: tf.Tensor) -> tf.Tensor:
        return tf.math.erf(tf.matmul(x, x)) + tf.exp(x)

    program = _on_replicas(formula, strategy, x)
    began = time.monotonic()
    values = program()
    seconds = time.monotonic() - began
    # Computed by TensorFlow kernel by kernel on the CPU, without XLA.
    with tf.device("CPU:0"):
        expected = formula(tf.constant(x)).numpy()
    # Errors of a product of 64 terms, each below 1/8 of 1; the unit is the product's.
    limit = 8 * _UNIT[device_kind(strategy)] + _SUMS
    for value in values:
        error = float(np.max(np.abs(value.numpy() - expected)))
        if not error <= limit:
            raise WrongError(
                f"XLA's result is off by {error:.2g}, where rounding explains {limit:.2g}: do not "
                "train on this device"
            )
    return f"XLA compiles for {device_kind(strategy)} ({seconds:.1f} s)"


def step_numbers(options: RunOptions, data: Data, strategy: tf.distribute.Strategy) -> str:
    """Some steps of a small ViT, compared with the same on this host's CPU in float32."""
    replicas = strategy.num_replicas_in_sync
    side = 2 * options.model.network["patch_size"]
    # Two blocks and four patches. Without random masks, which differ from replica to replica.
    network = {
        **options.model.network,
        "depth": 2,
        "image_size": (side, side),
        **dict.fromkeys(("dropout", "attention_dropout", "drop_path"), 0.0),
    }
    model, batch = {"network": network, "precision": "float32"}, {"batch_size": 8 * replicas}
    # Plain SGD: Adam would turn the rounding of a gradient near 0 into a whole step.
    rule = {"name": "sgd", "weight_decay": 0.0}
    small = _with(options, model=model, input=batch, optimizer=rule, step={"accumulation": 1})
    alone = tf.distribute.OneDeviceStrategy("CPU:0")
    # Without XLA, so that its numbers are judged as well.
    step = {"accumulation": 1, "jit": "off"}
    plain = _with(options, model=model, input=batch, optimizer=rule, step=step)
    reference = make_state(plain, alone)
    begin = reference.to_arrays()
    expected = _run_steps(plain, data, reference, alone)
    state = make_state(small, strategy)
    # Devices draw other random numbers, so the weights to begin with are the CPU's.
    state.from_arrays(begin)
    got = _run_steps(small, data, state, strategy)
    limit = _PRODUCTS * _UNIT[device_kind(strategy)] + _SUMS
    worst = 0.0
    for i, (mine, other) in enumerate(zip(got, expected, strict=True)):
        for name in ("loss", "grad_norm"):
            error = abs(mine[name] / other[name] - 1)
            worst = max(worst, error)
            if not error <= limit:
                raise WrongError(
                    f"{name} of step {i} is {mine[name]:.6g}, and {other[name]:.6g} on the CPU: "
                    f"{error:.2g} apart, where rounding explains {limit:.2g}. Do not train here; "
                    "see whether config.step.jit=off mends it, and report it"
                )
    return f"{_STEPS} steps agree with the CPU's float32 to {worst:.1g} (allowed: {limit:.1g})"


def _run_steps(
    options: RunOptions, data: Data, state: Any, strategy: tf.distribute.Strategy
) -> list[dict[str, float]]:
    run = make_step(options, data, state, strategy)
    batches = _batches(options, strategy)
    one = tf.constant(1, tf.int64)
    rows = [run(batches, one) for _ in range(_STEPS)]
    return [{name: float(row[name]) for name in ("loss", "grad_norm")} for row in rows]


def throughput(
    options: RunOptions, data: Data, strategy: tf.distribute.Strategy, *, per_replica: int
) -> str:
    """The speed of a matrix product, and of training steps of the config's model."""
    on_cpu = device_kind(strategy) == "CPU"
    precision = options.model.precision
    if precision == "float32" and not on_cpu:
        precision = "bfloat16"
    flops = _product_speed(strategy, size=1024 if on_cpu else 8192, dtype=precision)
    batch_size = per_replica * strategy.num_replicas_in_sync
    model, batch = {"precision": precision}, {"batch_size": batch_size}
    timed = _with(options, model=model, input=batch)
    timed, _ = fit_remat(timed, data.sources["train"].num_examples, strategy)
    state = make_state(timed, strategy)
    run = make_step(timed, data, state, strategy)
    batches = _batches(timed, strategy)
    steps = 2 if on_cpu else 20

    def some(n: int = steps) -> None:
        float(run(batches, tf.constant(n, tf.int64))["loss"])

    began = time.monotonic()
    some(1)
    first = time.monotonic() - began
    seconds = _shortest(some, times=2) / steps
    rate = batch_size / seconds
    variant = timed.record["model"]["variant"]
    return (
        f"product {flops / 1e12:.3g} TFLOP/s a replica in {precision}; {variant} at "
        f"{timed.image_size[0]} px, {per_replica} images a replica: {rate:.4g} images/s, "
        f"{rate / strategy.num_replicas_in_sync:.4g} a replica ({first:.0f} s to the first step)"
    )


def _product_speed(strategy: tf.distribute.Strategy, *, size: int, dtype: str) -> float:
    """Floating point operations per second of a chain of products on this host's first replica."""
    count = 10
    given = np.random.default_rng(0).standard_normal((size, size), np.float32)

    def chain(x: tf.Tensor) -> tf.Tensor:
        x = tf.cast(x, dtype)
        # An entry sums `size` terms: divided by the root of that, the numbers keep their size.
        scale = tf.cast(size**-0.5, dtype)
        y = tf.while_loop(
            lambda i, y: i < count, lambda i, y: (i + 1, tf.matmul(y, x) * scale), (0, x)
        )[1]
        return tf.reduce_sum(tf.cast(y, tf.float32))

    program = _on_replicas(chain, strategy, given)

    def once() -> None:
        program()[0].numpy()

    once()
    return 2 * size**3 * count / _shortest(once)


def memory(strategy: tf.distribute.Strategy) -> str:
    """What the checks took at most, of a device where it tells, and of this host."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    text = f"host {peak / 2**30:.1f} GiB at most"
    if device_kind(strategy) == "GPU":
        names = [device.name for device in tf.config.list_logical_devices("GPU")]
        peaks = [tf.config.experimental.get_memory_info(name)["peak"] for name in names]
        text += ", GPUs " + ", ".join(f"{p / 2**30:.1f}" for p in peaks) + " GiB"
    return text


def machine() -> list[str]:
    """Lines that a report needs besides the verdicts: processor, memory, environment."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        processor = f"{names[0]}, {len(names)} threads" if names else processor
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    prefixes = ("XLA_FLAGS", "TF_", "NCCL_", "CUDA_VISIBLE", "TPU_", "NEXT_PLUGGABLE", "LIBTPU")
    chosen = sorted(name for name in os.environ if name.startswith(prefixes))
    return [
        f"processor   {processor}; {pages / 2**30:.0f} GiB; {platform.platform()}",
        *(f"{name}={os.environ[name]}" for name in chosen),
    ]


def _on_replicas(
    function: Callable[[tf.Tensor], tf.Tensor], strategy: tf.distribute.Strategy, value: np.ndarray
) -> Callable[[], tuple[tf.Tensor, ...]]:
    """Makes a function that calls another, compiled, on each replica; returns what each gives."""
    # A variable, because XLA would compute with a constant while it compiles. It is read outside of
    # the compiled function, which would else hold the variable of the replica that was traced.
    with strategy.scope():
        variable = tf.Variable(value, trainable=False)
    # TPUStrategy compiles by itself.
    run = function if device_kind(strategy) == "TPU" else compiled(function)

    @tf.function(autograph=False)
    def call() -> tuple[tf.Tensor, ...]:
        results = strategy.run(lambda: run(tf.convert_to_tensor(variable)))
        return strategy.experimental_local_results(results)

    return call


def _shortest(function: Any, times: int = 5) -> float:
    """Seconds of the shortest of some calls."""
    found = []
    for _ in range(times):
        began = time.monotonic()
        function()
        found.append(time.monotonic() - began)
    return min(found)


def _batches(options: RunOptions, strategy: tf.distribute.Strategy) -> Iterator[Any]:
    """One made-up batch for ever; example i of it is the same on any number of replicas."""
    size, network = options.input.batch_size, options.model.network
    random = np.random.default_rng(0)
    shape = (size, *network["image_size"], network["channels"])
    images = random.integers(0, 256, shape, np.uint8)
    labels = random.integers(0, network["num_classes"], size)
    replicas, own = strategy.num_replicas_in_sync, host_replicas(strategy)

    def shares(x: np.ndarray) -> np.ndarray:
        return x.reshape(replicas, size // replicas, *x.shape[1:])[own.start : own.stop]

    # An element is one replica's share, as in a training.
    dataset = tf.data.Dataset.from_tensor_slices(
        {"image": shares(images), "label": shares(labels)}
    ).repeat()
    return iter(strategy.distribute_datasets_from_function(lambda _: dataset))


def _with(
    options: RunOptions,
    *,
    model: Mapping[str, Any],
    input: Mapping[str, Any],
    optimizer: Mapping[str, Any] = MappingProxyType({}),
    step: Mapping[str, Any] = MappingProxyType({}),
) -> RunOptions:
    """The options with some of their parts' fields changed."""
    changed = dataclasses.replace(options.model, **model)
    return dataclasses.replace(
        options,
        evaluation=dataclasses.replace(options.evaluation, model=changed),
        input=dataclasses.replace(options.input, mixing=None, **input),
        optimizer=dataclasses.replace(options.optimizer, **optimizer),
        step=dataclasses.replace(options.step, **step),
    )
