"""One optimiser step, which means the same on any number of replicas (law 2).

loss = sum over the global batch / global batch size. In each replica micro-batches accumulate, one
all-reduce sums the gradients, then every replica does the same: unscale, is it finite?, clip by the
global norm, update, moving average.

Shapes: b examples per replica, a micro-batches, C classes.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import tensorflow as tf

from vit_dist.training.losses import Loss, as_distribution
from vit_dist.training.state import TrainState
from vit_dist.training.update import Tensors, make_settle, make_update

JITS = ("auto", "whole", "split", "off")
ALL_REDUCE_DTYPES = ("float32", "bfloat16")

_INPUTS = ("image", "label", "mix", "mask")  # of a batch, as far as there


class Mixing(Protocol):
    """Mixes examples of a batch, whose "mix" (b, ...) says how."""

    def images(self, images: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Images (b, H, W, C), float, mixed."""

    def labels(self, labels: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        """Label distributions (b, C) mixed."""


def check_step(
    *,
    batch_size: int,
    num_replicas: int,
    accumulation: int = 1,
    clip_norm: float | None = 1.0,
    ema_decay: float | None = None,
    all_reduce_dtype: str = "float32",
    jit: str = "auto",
    shard_state: bool = False,
) -> None:
    """Raises ValueError for arguments of make_train_step that cannot work; touches no device."""
    if accumulation < 1:
        raise ValueError(f"step.accumulation must be 1 or more, got {accumulation}")
    unit = num_replicas * accumulation
    if batch_size < 1 or batch_size % unit:
        raise ValueError(
            f"input.batch_size {batch_size} is not divisible by {num_replicas} replicas x "
            f"{accumulation} micro-batches; the nearest that is: "
            f"{max(round(batch_size / unit), 1) * unit}"
        )
    if clip_norm is not None and clip_norm <= 0:
        raise ValueError(
            f"step.clip_norm must be above 0, or None for no clipping, got {clip_norm}"
        )
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"step.ema_decay must be between 0 and 1, or None, got {ema_decay}")
    for key, value, allowed in (
        ("jit", jit, JITS),
        ("all_reduce_dtype", all_reduce_dtype, ALL_REDUCE_DTYPES),
    ):
        if value not in allowed:
            raise ValueError(f"step.{key} {value!r} is unknown; allowed: {', '.join(allowed)}")
    if shard_state and jit == "whole" and num_replicas > 1:
        raise ValueError(
            "step.jit 'whole' does not go with optimizer.shard_state on several replicas: the "
            "weights are gathered between two parts; take auto or split"
        )


def choose_jit(jit: str, *, kind: str, num_replicas: int, sharded: bool = False) -> str:
    """Where XLA compiles the step (law 7).

    "whole" compiles the function given to strategy.run, all-reduce included: one device, or GPUs.
    "split" compiles forward + backward and the update apart, the all-reduce between them: several
    CPUs, whose collectives XLA lacks. On TPUs "off": TPUStrategy compiles everything itself.
    With `sharded` optimiser state the weights are gathered as well, and it is "split" for several
    replicas of any kind.
    """
    if kind == "TPU":
        return "off"
    if jit != "auto":
        return jit
    return "split" if num_replicas > 1 and (kind == "CPU" or sharded) else "whole"


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
    """Makes gradients(batch, replica): this replica's share of the global gradient."""
    variables = [v.value for v in state.optimizer.variables.values()]

    def micro(batch: Tensors, key: tf.Tensor):
        images = preprocess(batch["image"])
        if mixing is not None:
            images = mixing.images(images, batch["mix"])
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            logits = state.model(images, training=True, seed=key)
            targets = as_distribution(batch["label"], logits.shape[-1])
            if mixing is not None:
                targets = mixing.labels(targets, batch["mix"])
            loss = _sum(loss_fn(logits, targets), batch) / batch_size
            scaled = loss * state.loss_scale
        hits = tf.equal(tf.argmax(logits, -1), tf.argmax(targets, -1))
        grads = tape.gradient(scaled, variables, unconnected_gradients="zero")
        sums = {"loss": loss, "accuracy": _sum(tf.cast(hits, tf.float32), batch) / batch_size}
        if masked:
            sums["masked"] = tf.reduce_sum(1 - batch["mask"])
        return grads, sums

    def gradients(batch: Tensors, replica: tf.Tensor):
        key = tf.stack([tf.constant(seed, tf.int32), tf.cast(state.step.value(), tf.int32)])
        key = tf.random.experimental.stateless_fold_in(key, replica, alg="philox")
        if accumulation == 1:
            return micro(batch, key)
        parts = {
            k: tf.reshape(x, (accumulation, x.shape[0] // accumulation, *x.shape[1:]))
            for k, x in batch.items()
        }

        def body(i: tf.Tensor, grads: list[tf.Tensor], sums: Tensors):
            micro_key = tf.random.experimental.stateless_fold_in(key, i, alg="philox")
            more, metrics = micro({k: x[i] for k, x in parts.items()}, micro_key)
            sums = {k: sums[k] + v for k, v in metrics.items()}
            return i + 1, [a + b for a, b in zip(grads, more, strict=True)], sums

        zeros = [tf.zeros(v.shape, v.dtype) for v in variables]
        names = ("loss", "accuracy", *(("masked",) if masked else ()))
        start = (tf.constant(0), zeros, {name: tf.constant(0.0) for name in names})
        _, grads, sums = tf.while_loop(
            lambda i, *_: i < accumulation, body, start, maximum_iterations=accumulation
        )
        return grads, sums

    return gradients


def _sum(values: tf.Tensor, batch: Tensors) -> tf.Tensor:
    """Sum over the examples; a masked one is 0, whatever became of it (a select, no product)."""
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
    accumulation: int = 1,
    clip_norm: float | None = 1.0,
    ema_decay: float | None = None,
    all_reduce_dtype: str = "float32",
    jit: str = "whole",
    mixing: Mixing | None = None,
    masked: bool = False,
) -> Callable[[Iterator[Any], tf.Tensor], Tensors]:
    """Makes train_steps(batches, n), which runs n steps without the host in between (law 4).

    Args:
      state: what the steps change.
      loss_fn: logits (b, C), labels -> (b,).
      strategy: whose replicas run the step.
      schedule: step -> learning rate.
      preprocess: images as the input delivers them (uint8) -> as the model takes them; on device.
      batch_size: global.
      seed: of dropout and stochastic depth.
      accumulation: micro-batches per replica; memory does not grow with their number.
      clip_norm: largest global norm of the gradient of the global batch; None for no clipping.
      ema_decay: of the moving average in `state`.
      all_reduce_dtype: "bfloat16" halves what replicas send each other, and rounds each one's share
        of the gradient to 8 bits; "float32" does not. A single replica sends nothing.
      jit: "whole", "split" or "off"; see choose_jit.
      mixing: mixup and CutMix of images and labels, within each micro-batch; None for none.
      masked: batches have a "mask", float32 (b,); examples where it is 0 add nothing to the sums.

    Returns:
      train_steps(batches, n): `batches` iterates over {"image", "label"}, with "mix" (by example
      what `mixing` takes) if there is mixing; n is a scalar int tensor.
      It returns float32 scalars: "loss" and "accuracy" are means over the n steps, "grad_norm"
      (before clipping) and "learning_rate" those of the last, "masked" (if so) is the number of
      examples masked in them, "input_wait" the seconds that the host waited for their batches.
    """
    gradients = make_gradients(
        state,
        loss_fn,
        preprocess=preprocess,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        mixing=mixing,
        masked=masked,
    )
    update = make_update(state, schedule=schedule, clip_norm=clip_norm, ema_decay=ema_decay)
    settle = make_settle(state, ema_decay=ema_decay) if state.optimizer.shards else None
    check_step(
        batch_size=batch_size,
        accumulation=accumulation,
        jit=jit,
        num_replicas=strategy.num_replicas_in_sync,
        shard_state=settle is not None,
    )
    if jit == "split":
        gradients, update = _compiled(gradients), _compiled(update)
        settle = _compiled(settle) if settle else None
    sent_as = all_reduce_dtype if strategy.num_replicas_in_sync > 1 else None
    run = _make_replica_step(gradients, update, settle, sent_as=sent_as)
    run = _compiled(run) if jit == "whole" else run
    return _make_loop(run, strategy, counted=("masked",) if masked else ())


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Grappler can do nothing for what XLA compiles, and took a second of the 12 to the first step.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    return tf.function(function, jit_compile=True, autograph=False)


def _make_replica_step(
    gradients: Callable[..., Any],
    update: Callable[..., Any],
    settle: Callable[..., None] | None,
    *,
    sent_as: str | None,
) -> Callable[[Tensors], Tensors]:
    """What each replica runs; `sent_as` is the type of gradients on their way, None for no way."""

    def replica_step(batch: Tensors) -> Tensors:
        context = tf.distribute.get_replica_context()
        replica = tf.cast(context.replica_id_in_sync_group, tf.int32)
        grads, sums = gradients(batch, replica)
        if sent_as is not None:
            grads, sums = _all_reduce(context, grads, sums, sent_as)
        if settle is None:
            return update(grads, sums)
        # Each replica is traced for itself, as a number of its own: it has slots of its own.
        number = int(tf.get_static_value(context.replica_id_in_sync_group))
        metrics, packed, gate = update(grads, sums, number)
        settle(packed if sent_as is None else context.all_gather(packed, axis=0), gate)
        return metrics

    return replica_step


def _all_reduce(
    context: tf.distribute.ReplicaContext, grads: list[tf.Tensor], sums: Tensors, sent_as: str
) -> tuple[list[tf.Tensor], Tensors]:
    """Both summed over the replicas; gradients travel as `sent_as`."""
    add = functools.partial(context.all_reduce, tf.distribute.ReduceOp.SUM)
    if sent_as == "float32":
        return add((grads, sums))
    # Apart: TensorFlow packs what it gets into one tensor, and fails where types differ.
    sent, sums = add([tf.cast(g, sent_as) for g in grads]), add(sums)
    return [tf.cast(g, tf.float32) for g in sent], sums


def _make_loop(
    run: Callable[[Tensors], Tensors],
    strategy: tf.distribute.Strategy,
    counted: tuple[str, ...] = (),
) -> Callable[[Iterator[Any], tf.Tensor], Tensors]:
    means, last = ("loss", "accuracy"), ("grad_norm", "learning_rate")
    summed = means + counted

    @tf.function
    def train_steps(batches: Iterator[Any], n: tf.Tensor) -> Tensors:
        out = {name: tf.constant(0.0) for name in summed + last}
        waited = tf.constant(0.0, tf.float64)
        for _ in tf.range(n):
            batch, seconds = _timed_next(batches)
            waited += seconds
            batch = {k: batch[k] for k in _INPUTS if k in batch}
            new = strategy.run(run, args=(batch,))
            # The sums are all-reduced: every replica holds the same numbers.
            new = {k: strategy.experimental_local_results(v)[0] for k, v in new.items()}
            out = {k: new[k] + out[k] if k in summed else new[k] for k in out}
        count = tf.cast(n, tf.float32)
        out = {k: v / count if k in means else v for k, v in out.items()}
        return {**out, "input_wait": tf.cast(waited, tf.float32)}

    return train_steps


@tf.autograph.experimental.do_not_convert
def _timed_next(batches: Iterator[Any]) -> tuple[Any, tf.Tensor]:
    """The next batch, and the seconds until it was there, float64."""
    began = tf.timestamp()
    with tf.control_dependencies([began]):
        batch = next(batches)
    with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
        return batch, tf.timestamp() - began
