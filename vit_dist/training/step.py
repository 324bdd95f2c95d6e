"""One optimizer step, which means the same on any number of replicas (law 2).

loss = sum over the global batch / global batch size. In each replica the gradients of micro-batches
add up; one all-reduce sums them over the replicas; then every replica does what update.py says:
unscale, test for infinities, clip by the global norm, update, moving average.

Shapes: b examples per replica, a micro-batches, C classes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import tensorflow as tf

from vit_dist.cluster.hosts import device_kind, num_hosts
from vit_dist.config.errors import ConfigError
from vit_dist.training.fallback import MEANS, Program, first_that_compiles, timed_next
from vit_dist.training.losses import Loss, as_distribution
from vit_dist.training.state import TrainState
from vit_dist.training.update import Tensors, Updated, make_settle, make_update
from vit_dist.training.watch import Watch, WatchOptions

JITS = ("auto", "whole", "split", "off")
ALL_REDUCE_DTYPES = ("float32", "bfloat16")

# The entries of a batch that the step uses; "mix" and "mask" are optional. Other entries that a
# pipe keeps are not passed on: XLA could not take strings, for one.
_INPUTS = ("image", "label", "mix", "mask")

# Gradients that travel between two hosts' CPUs are summed in packs of about this size. In one pack
# TensorFlow's ring copies parts as large as a quarter of the model through gRPC, several times
# each, and page faults of fresh memory cost as much as the copies. 1 and 16 MB were tried:
# docs/benchmarks.md. One large variable is one pack.
_PACK_BYTES = 4_000_000


class Mixing(Protocol):
    """Mixes the examples of a batch, as the batch's entry "mix" (b, ...), `rows` here, says."""

    def images(self, images: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Images (b, H, W, C), float, mixed."""

    def labels(self, labels: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Label distributions (b, C) mixed."""


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step does besides the model, the loss and the optimizer.

    Attributes:
      accumulation: micro-batches per replica and step; memory does not grow with their number.
      clip_norm: largest global norm of the gradient of the global batch; None for no clipping.
      ema_decay: d in average = d * average + (1 - d) * weights; None for no moving average.
      ema_warmup: whether d grows to ema_decay from 0, as 1 - (1 + updates)^(-2/3).
      all_reduce_dtype: dtype in which replicas send each other gradients. "bfloat16" halves the
        traffic and rounds each replica's share of the gradient to 8 bits of mantissa; "float32"
        rounds nothing. A single replica sends nothing.
      jit: "auto", "whole", "split" or "off"; see choose_jit.

    Raises:
      ConfigError: a number out of range, or an unknown name.
    """

    accumulation: int = 1
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    ema_warmup: bool = False
    all_reduce_dtype: str = "float32"
    jit: str = "auto"

    def __post_init__(self) -> None:
        if self.accumulation < 1:
            raise ConfigError(f"step.accumulation must be 1 or more, got {self.accumulation}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ConfigError(
                f"step.clip_norm must be above 0, or None for no clipping, got {self.clip_norm}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(
                f"step.ema_decay must be between 0 and 1, or None, got {self.ema_decay}"
            )
        choices = {"jit": JITS, "all_reduce_dtype": ALL_REDUCE_DTYPES}
        for key, allowed in choices.items():
            value = getattr(self, key)
            if value not in allowed:
                raise ConfigError(f"step.{key} {value!r} is unknown; allowed: {', '.join(allowed)}")


def check_batch(
    batch_size: int, options: StepOptions, *, num_replicas: int, shard_state: bool = False
) -> None:
    """Checks that a global batch can be cut into replicas and micro-batches.

    Raises:
      ConfigError: it cannot, or step.jit and optimizer.shard_state exclude each other.
    """
    # Every micro-batch of every replica has the same size: XLA compiles static shapes only (law 7).
    unit = num_replicas * options.accumulation
    if batch_size < 1 or batch_size % unit:
        raise ConfigError(
            f"input.batch_size {batch_size} is not divisible by {num_replicas} replicas x "
            f"{options.accumulation} micro-batches; the nearest that is: "
            f"{max(round(batch_size / unit), 1) * unit}"
        )
    if shard_state and options.jit == "whole" and num_replicas > 1:
        raise ConfigError(
            "step.jit 'whole' does not go with optimizer.shard_state on several replicas: the "
            "weights are gathered between two parts; take auto or split"
        )


def choose_jit(jit: str, *, kind: str, num_replicas: int) -> str:
    """Where XLA compiles the step (law 7): resolves "auto"; other choices come back unchanged.

    "whole" compiles the function that each replica runs, the sum of gradients over the replicas
    included: `auto` for one replica, which has no such sum. "split" compiles forward + backward,
    and the update; TensorFlow sums the gradients in between: `auto` for several replicas of any
    kind. On TPUs "off": TPUStrategy compiles everything itself.

    Args:
      jit: "auto", "whole", "split" or "off".
      kind: "CPU", "GPU" or "TPU".
      num_replicas: over all hosts.
    """
    if kind == "TPU":
        return "off"
    if jit != "auto":
        return jit
    return "split" if num_replicas > 1 else "whole"


def choose_pack_bytes(strategy: tf.distribute.Strategy) -> int:
    """About how many bytes of gradients one collective sums over the hosts; 0 for all of them.

    Several packs only for two hosts of one CPU each. Of two numbers there is one sum, however they
    are packed. With three replicas or more, the ring adds a number's shares in an order that
    depends on its place in the pack: packs would change the last bits of what runs have computed
    until now. NCCL, between GPUs, has none of gRPC's copies.
    """
    several_hosts = num_hosts(strategy) > 1
    two = strategy.num_replicas_in_sync == 2
    return _PACK_BYTES if several_hosts and two and device_kind(strategy) == "CPU" else 0


def jit_warnings(jit: str, *, kind: str, num_replicas: int) -> list[str]:
    """Warnings about the `step.jit` that a config asks for; none about what "auto" chooses."""
    if jit != "whole" or kind == "TPU" or num_replicas == 1:
        return []
    # tensorflow#45940, #53140, #56423, #58787, #58961, #61314, keras#18145, models PR#10845:
    # TensorFlow 2.4 to 2.13 failed to compile it, hung, or leaked memory. A failure is noticed at
    # the first step (fallback.py), a hang is not.
    return [
        f"step.jit=whole puts the sum over {num_replicas} replicas into XLA's program, which is "
        "not proved for several replicas: where it hangs, take auto, which is split"
    ]


def make_gradients(
    state: TrainState,
    loss_fn: Loss,
    *,
    preprocess: Callable[[tf.Tensor], tf.Tensor],
    batch_size: int,
    accumulation: int,
    seed: int,
    mixing: Mixing | None = None,
    masked: bool = False,
) -> Callable[[Tensors, tf.Tensor], tuple[list[tf.Tensor], Tensors]]:
    """Makes gradients(batch, replica) -> (gradients, metrics), this replica's share of both.

    A gradient (float32, one per variable that trains) is that of this replica's sum of losses,
    divided by the *global* batch size and multiplied by the loss scale. Summed over the replicas,
    the shares are the gradient and the metrics of the global batch.
    """
    # `.value` is the tf.Variable behind Keras's variable, which is what a GradientTape watches.
    variables = [v.value for v in state.optimizer.variables.values()]

    def micro(batch: Tensors, key: tf.Tensor):
        # Per micro-batch, so that only its images exist as floats: they take 2 to 4 times the room
        # of the uint8 that the input delivers (law 5).
        images = preprocess(batch["image"])
        if mixing is not None:
            images = mixing.images(images, batch["mix"])
        # Frozen variables are not watched: they cost no backward pass.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            logits = state.model(images, training=True, seed=key)
            targets = as_distribution(batch["label"], logits.shape[-1])
            if mixing is not None:
                targets = mixing.labels(targets, batch["mix"])
            # The divisor is the global batch, so that shares of replicas and of micro-batches only
            # have to be added: no share weighs more than another (law 2).
            loss = _sum(loss_fn(logits, targets), batch) / batch_size
            scaled = loss * state.loss_scale
        # Of a mixed image the label with the larger share counts as right.
        hits = tf.equal(tf.argmax(logits, -1), tf.argmax(targets, -1))
        # A variable that the loss does not reach has a gradient of zeros.
        grads = tape.gradient(scaled, variables, unconnected_gradients="zero")
        sums = {"loss": loss, "accuracy": _sum(tf.cast(hits, tf.float32), batch) / batch_size}
        if masked:
            sums["masked"] = tf.reduce_sum(1 - batch["mask"])
        return grads, sums

    def gradients(batch: Tensors, replica: tf.Tensor):
        # Dropout's masks are a function of seed, step, replica and micro-batch (law 1): the step
        # comes from the state, so that a resume draws what the run would have drawn. The algorithm
        # is named, because the default "auto_select" gives other numbers on other devices.
        key = tf.stack([tf.constant(seed, tf.int32), tf.cast(state.step.value(), tf.int32)])
        key = tf.random.experimental.stateless_fold_in(key, replica, alg="philox")
        if accumulation == 1:
            return micro(batch, key)
        # (b, ...) -> (a, b / a, ...): micro-batch i is a run of neighbours, so that examples which
        # mixup and CutMix pair stay together.
        parts = {
            k: tf.reshape(x, (accumulation, x.shape[0] // accumulation, *x.shape[1:]))
            for k, x in batch.items()
        }

        def body(i: tf.Tensor, grads: list[tf.Tensor], sums: Tensors):
            micro_key = tf.random.experimental.stateless_fold_in(key, i, alg="philox")
            more, metrics = micro({k: x[i] for k, x in parts.items()}, micro_key)
            sums = {k: sums[k] + v for k, v in metrics.items()}
            return i + 1, [a + b for a, b in zip(grads, more, strict=True)], sums

        # tf.while_loop runs on the device, one micro-batch after the other. A Python loop would be
        # traced once for each, and all micro-batches might be in memory at once.
        zeros = [tf.zeros(v.shape, v.dtype) for v in variables]
        names = ("loss", "accuracy", *(("masked",) if masked else ()))
        start = (tf.constant(0), zeros, {name: tf.constant(0.0) for name in names})
        _, grads, sums = tf.while_loop(
            lambda i, *_: i < accumulation, body, start, maximum_iterations=accumulation
        )
        return grads, sums

    return gradients


def _sum(values: tf.Tensor, batch: Tensors) -> tf.Tensor:
    """Sum over the examples that are not masked: a select, because 0 * NaN would still be NaN."""
    return tf.reduce_sum(tf.where(batch["mask"] > 0, values, 0.0) if "mask" in batch else values)


def make_train_step(
    state: TrainState,
    loss_fn: Loss,
    *,
    strategy: tf.distribute.Strategy,
    schedule: Callable[[tf.Tensor], tf.Tensor],
    preprocess: Callable[[tf.Tensor], tf.Tensor],
    batch_size: int,
    seed: int,
    options: StepOptions | None = None,
    mixing: Mixing | None = None,
    masked: bool = False,
    watch: WatchOptions | None = None,
) -> Callable[[Iterator[Any], tf.Tensor], Tensors]:
    """Makes train_steps(batches, n), which runs n steps without the host in between (law 4).

    Args:
      state: what the steps change.
      loss_fn: logits (b, C), label distributions (b, C) -> losses (b,), float32.
      strategy: the one under whose scope `state` was made; its replicas run the step.
      schedule: step -> learning rate.
      preprocess: images as the input delivers them (uint8) -> as the model takes them; on device.
      batch_size: global.
      seed: decides the masks of dropout and stochastic depth, with step, replica and micro-batch.
      options: None for the defaults of StepOptions.
      mixing: mixup and CutMix of images and labels, within each micro-batch; None for none.
      masked: batches have a "mask", float32 (b,); examples where it is 0 add nothing to the sums.
      watch: which norms and histograms the step computes besides; None for none.

    Returns:
      train_steps(batches, n): `batches` iterates over {"image", "label"}, with "mix" (by example
      what `mixing` takes) if there is mixing; n is a scalar int tensor.
      It returns float32 scalars. Means over the n steps: "loss" and "accuracy". Of the last step:
      "grad_norm" (before clipping), "learning_rate", in float16 "applied", 1.0 if it changed the
      weights, and what `watch` asks for (see watch.Watch; arrays among them). Sums over the n
      steps: "masked", a number of examples, if `masked`, and "input_wait", the seconds that the
      host waited for batches.

    Raises:
      ConfigError: the batch cannot be cut into replicas and micro-batches.
    """
    options = options or StepOptions()
    replicas, sharded = strategy.num_replicas_in_sync, state.optimizer.shards is not None
    check_batch(batch_size, options, num_replicas=replicas, shard_state=sharded)
    gradients: Any = make_gradients(
        state,
        loss_fn,
        preprocess=preprocess,
        batch_size=batch_size,
        accumulation=options.accumulation,
        seed=seed,
        mixing=mixing,
        masked=masked,
    )
    # All functions made here are plain Python at first. Nothing is traced or compiled before the
    # first call of train_steps, which knows the shapes of a batch.
    average: dict[str, Any] = {"ema_decay": options.ema_decay, "ema_warmup": options.ema_warmup}
    watched = Watch(state, watch)
    update: Any = make_update(
        state, schedule=schedule, clip_norm=options.clip_norm, watch=watched, **average
    )
    settle: Any = make_settle(state, watch=watched, **average) if sharded else None
    jit = choose_jit(options.jit, kind=device_kind(strategy), num_replicas=replicas)
    sent_as = options.all_reduce_dtype if replicas > 1 else None
    pack_bytes = choose_pack_bytes(strategy)
    # The loop has to know the names of the metrics before it traces its body.
    applied = ("applied",) if state.model.compute_dtype == "float16" else ()
    last = ("grad_norm", "learning_rate", *applied, *watched.scalars)
    counted = ("masked",) if masked else ()

    def program(jit: str) -> Program:
        parts: tuple[Any, ...] = (gradients, update, settle)
        # What XLA compiles must not hold the all-reduce when several replicas run: see choose_jit.
        if jit == "split":
            parts = tuple(compiled(part) if part else None for part in parts)
        run = _make_replica_step(*parts, sent_as=sent_as, pack_bytes=pack_bytes)
        one_step = _make_one_step(compiled(run) if jit == "whole" else run, strategy)
        loop = _make_loop(one_step, counted=counted, last=last, arrays=watched.arrays)
        return Program(tf.function(one_step, autograph=False), loop, counted=counted)

    if jit == "whole" and replicas > 1:
        whole, split = program("whole"), program("split")
        return without_grappler(first_that_compiles(whole, split, state=state))
    loop = program(jit).loop
    return loop if jit == "off" else without_grappler(loop)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A tf.function that XLA compiles."""
    return tf.function(function, jit_compile=True, autograph=False)


def without_grappler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls the function with TensorFlow's graph optimizer off, and puts it back as it was.

    Grappler can do nothing for what XLA compiles, and took a second of the 12 to the first step.
    The setting belongs to the process and is read at each call. It is restored after each, so that
    a notebook's own functions and the input pipeline keep their optimizer.
    """

    @functools.wraps(getattr(function, "python_function", function))
    def call(*args: Any) -> Any:
        # The getter gives {} where nothing was set; the setter keeps what it is not told.
        before = tf.config.optimizer.get_experimental_options()
        off = bool(before.get("disable_meta_optimizer", False))
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        try:
            return function(*args)
        finally:
            tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": off})

    return call


def _make_replica_step(
    gradients: Callable[..., Any],
    update: Callable[..., Updated],
    settle: Callable[..., Tensors] | None,
    *,
    sent_as: str | None,
    pack_bytes: int,
) -> Callable[[Tensors], Tensors]:
    """Makes the function that each replica runs on its share of a batch.

    `sent_as` is the dtype in which gradients are all-reduced, None if there is one replica only;
    for `pack_bytes` see choose_pack_bytes.
    """

    def replica_step(batch: Tensors) -> Tensors:
        context = tf.distribute.get_replica_context()
        # TensorFlow's name for the number of the replica over all hosts. On TPUs it is a tensor,
        # since all replicas run one program.
        replica = tf.cast(context.replica_id_in_sync_group, tf.int32)
        grads, sums = gradients(batch, replica)
        if sent_as is not None:
            grads, sums = _all_reduce(context, grads, sums, sent_as, pack_bytes)
        if settle is None:
            return update(grads, sums).metrics
        # With sharded state every replica updates other variables, so each traces a graph of its
        # own, and needs its number as a Python int while tracing.
        number = int(tf.get_static_value(context.replica_id_in_sync_group))
        done = update(grads, sums, number)
        # (n,) -> (R n,), in the order of the replicas; a single replica has nothing to gather.
        packed = done.packed if sent_as is None else context.all_gather(done.packed, axis=0)
        return {**done.metrics, **settle(packed, done.apply_update)}

    return replica_step


def _all_reduce(
    context: tf.distribute.ReplicaContext,
    grads: list[tf.Tensor],
    sums: Tensors,
    sent_as: str,
    pack_bytes: int,
) -> tuple[list[tf.Tensor], Tensors]:
    """Gradients and metrics, float32, summed over the replicas; gradients travel as `sent_as`."""
    # Given here, because an all-reduce does not read bytes_per_pack from the strategy's options.
    options = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=pack_bytes)
    add = functools.partial(context.all_reduce, tf.distribute.ReduceOp.SUM, options=options)
    if sent_as == "float32":
        return add((grads, sums))
    # Two calls: TensorFlow concatenates tensors of a call, and fails where dtypes differ.
    sent, sums = add([tf.cast(g, sent_as) for g in grads]), add(sums)
    return [tf.cast(g, tf.float32) for g in sent], sums


def _make_one_step(
    run: Callable[[Tensors], Tensors], strategy: tf.distribute.Strategy
) -> Callable[[Any], Tensors]:
    """Makes one_step(batch), which runs all replicas; its metrics are those of the global batch."""

    def one_step(batch: Any) -> Tensors:
        batch = {k: batch[k] for k in _INPUTS if k in batch}
        new = strategy.run(run, args=(batch,))
        # The sums are all-reduced: every replica holds the same numbers.
        return {k: strategy.experimental_local_results(v)[0] for k, v in new.items()}

    return one_step


def _make_loop(
    one_step: Callable[[Any], Tensors],
    *,
    counted: tuple[str, ...],
    last: tuple[str, ...],
    arrays: Mapping[str, tuple[int, ...]],
) -> Callable[[Iterator[Any], tf.Tensor], Tensors]:
    """The loop over n steps: `counted` metrics are summed, `last` ones are the last step's.

    So are `arrays`, metrics that are no scalars, by name and shape.
    """
    summed = MEANS + counted

    # Traced once: `n` is a tensor, so any number of steps is the same program. The loop is one of
    # the graph, which takes the next batch without going back to Python. Not compiled by XLA as a
    # whole: an iterator cannot be read there. Nor converted by AutoGraph, which would read and
    # rewrite the source of all that the step calls: a third of the time to the first step.
    @tf.function(autograph=False)
    def train_steps(batches: Iterator[Any], n: tf.Tensor) -> Tensors:
        def turn(i: tf.Tensor, waited: tf.Tensor, out: Tensors) -> tuple[Any, ...]:
            batch, seconds = timed_next(batches)
            new = one_step(batch)
            out = {k: new[k] + out[k] if k in summed else new[k] for k in out}
            return i + 1, waited + seconds, out

        # A loop's variables need a value, of their final dtype, before its first turn.
        out = {name: tf.constant(0.0) for name in summed + last}
        out |= {name: tf.zeros(shape) for name, shape in arrays.items()}
        start = (tf.zeros_like(n), tf.constant(0.0, tf.float64), out)
        _, waited, out = tf.while_loop(lambda i, *_: i < n, turn, start)
        count = tf.cast(n, tf.float32)
        out = {k: v / count if k in MEANS else v for k, v in out.items()}
        return {**out, "input_wait": tf.cast(waited, tf.float32)}

    return train_steps
