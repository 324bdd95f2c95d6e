"""Exact classification metrics: each example counts once, on any number of replicas."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vit_dist.cluster.hosts import all_hosts_arrays
from vit_dist.config.errors import DataError
from vit_dist.evaluators.verdicts import Verdicts
from vit_dist.training.losses import Loss, as_distribution
from vit_dist.training.step import compiled, without_grappler

Tensors = dict[str, tf.Tensor]
_TOP = 5  # how many classes count for "top5_accuracy"
_ROWS = "verdicts"  # what a batch's step calls the rows of its examples


def make_evaluator(
    model: keras.Model,
    loss_fn: Loss,
    *,
    strategy: tf.distribute.Strategy,
    preprocess: Callable[[tf.Tensor], tf.Tensor],
    jit: bool = True,
    verdicts: bool = False,
) -> Callable[..., dict[str, float] | None]:
    """Makes evaluate(dataset, stop=..., look=...) -> accuracy, top5_accuracy, loss, examples.

    Args:
      model: images -> logits (b, C); its weights are read when evaluate is called.
      loss_fn: logits (b, C), labels -> losses (b,).
      strategy: its replicas share the work.
      preprocess: images as the input delivers them (uint8) -> as the model takes them; on device.
      jit: compile with XLA.
      verdicts: whether each example's verdict is gathered, too: five numbers an example. Without,
        the program on the devices has nothing of them.

    Returns:
      A function of a distributed data set of {"image", "label", "mask"}, "mask" (b,) being 0 for
      padding and unreadable images. `stop` is called after each batch, on every host; if it returns
      true, the evaluation is given up and the function returns None. With `verdicts`, `look` gets
      the Verdicts of all examples of all hosts, on every host.
      "accuracy" is the share of examples whose top class is among their labels, "top5_accuracy" of
      those that have a label among their five top classes (absent with 5 classes or fewer). Of
      equal logits the first counts as larger, so a head of zeros scores as chance does. NaN is
      never a hit.
    """

    sums = make_sums(model, loss_fn, preprocess=preprocess, verdicts=verdicts)
    # TPUStrategy compiles everything itself.
    whole = jit and not isinstance(strategy, tf.distribute.TPUStrategy)
    one_replica = compiled(sums) if whole else sums

    def replica_sums(images: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor) -> Tensors:
        # A plain function around the compiled one: if strategy.run is given a tf.function, it
        # compiles all CPU devices into one program, which XLA refuses.
        return one_replica(images, labels, mask)

    @tf.function(autograph=False)
    def step(batch: Tensors) -> Tensors:
        out = strategy.run(replica_sums, args=(batch["image"], batch["label"], batch["mask"]))
        # Rows stay where they are made: a gather at each batch costs hosts a tenth of what a very
        # small network does.
        rows = {_ROWS: out.pop(_ROWS)} if verdicts else {}
        return {**rows, **{k: strategy.reduce("SUM", v, axis=None) for k, v in out.items()}}

    run_step = without_grappler(step) if whole else step

    def evaluate(
        dataset: Any,
        *,
        stop: Callable[[], bool] = lambda: False,
        look: Callable[[Verdicts], None] | None = None,
    ) -> dict[str, float] | None:
        # Batches are added up in float64: float32 counts examples exactly only up to 16 million.
        totals: Tensors = {}
        rows: list[Any] = []
        for batch in dataset:
            out = run_step(batch)
            if verdicts:
                rows.append(out.pop(_ROWS))
            new = {k: tf.cast(v, tf.float64) for k, v in out.items()}
            totals = {k: totals[k] + v for k, v in new.items()} if totals else new
            if stop():
                return None
        if not totals or not float(totals["examples"]):
            raise DataError(
                "nothing to evaluate: the split has no examples, or all of them are masked"
            )
        examples = float(totals.pop("examples"))
        means = {k: float(v) / examples for k, v in totals.items()}
        # Fetched from the devices only now, so that the batches did not wait for it.
        if verdicts and look is not None:
            look(_verdicts_of(_joined(rows, strategy)))
        return {**means, "examples": examples}

    return evaluate


def make_sums(
    model: keras.Model,
    loss_fn: Loss,
    *,
    preprocess: Callable[[tf.Tensor], tf.Tensor],
    verdicts: bool = False,
) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], Tensors]:
    """Makes sums(images, labels, mask), what a replica computes of its share of a batch.

    Arguments are those of `make_evaluator`; images (b, H, W, C) uint8, labels (b,) int32 or (b, C)
    float32, mask (b,) float32. It returns float32 scalars, sums over the examples with mask 1; with
    `verdicts` also the rows of the examples.
    """

    def sums(images: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor) -> Tensors:
        logits = model(preprocess(images), training=False)
        targets = as_distribution(labels, logits.shape[-1])
        rank, best = _rank(logits, targets)
        out = {"accuracy": tf.cast(rank < 1, tf.float32), "loss": loss_fn(logits, labels)}
        if logits.shape[-1] > _TOP:
            out["top5_accuracy"] = tf.cast(rank < _TOP, tf.float32)
        out["examples"] = tf.ones_like(mask)
        # A select and not a product: the model may give NaN for padding, and 0 * NaN is NaN.
        found = {k: tf.reduce_sum(tf.where(mask > 0, v, 0.0)) for k, v in out.items()}
        return {**found, _ROWS: _rows(logits, labels, best, mask)} if verdicts else found

    return sums


def metric_names(num_classes: int) -> tuple[str, ...]:
    """The means that an evaluator of so many classes gives, without its number of examples."""
    return ("accuracy", "loss", *(("top5_accuracy",) if num_classes > _TOP else ()))


def _rows(logits: tf.Tensor, labels: tf.Tensor, best: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """What is kept of each example: float32 (b, 5), in the order that `_verdicts_of` reads."""
    p = tf.nn.softmax(tf.cast(logits, tf.float32))
    # Of class numbers the label itself: with logits of NaN `best` may be another class.
    label = tf.cast(labels, tf.int32)[:, None] if labels.shape.rank == 1 else best
    prediction = tf.argmax(logits, -1, tf.int32)[:, None]
    columns = [
        # One tensor for all of it, so that there is one to fetch. float32 holds class numbers up to
        # 16 million exactly.
        *(tf.cast(n, tf.float32) for n in (mask[:, None], label, prediction)),
        tf.gather(p, prediction, batch_dims=1),
        tf.gather(p, label, batch_dims=1),
    ]
    return tf.concat(columns, axis=1)


def _joined(batches: Sequence[Any], strategy: tf.distribute.Strategy) -> np.ndarray:
    """The rows of all examples of all hosts in the order of the source, (positions, 5).

    `batches` are what the replicas gave for each global batch; this is a collective.
    """
    own = np.stack(
        [[part.numpy() for part in strategy.experimental_local_results(b)] for b in batches]
    )
    # (hosts, batches, replicas of a host, b, 5). A global batch goes round the replicas in order.
    hosts = all_hosts_arrays(strategy, own)
    return np.moveaxis(hosts, 0, 1).reshape(-1, own.shape[-1])


def _verdicts_of(rows: np.ndarray) -> Verdicts:
    """The verdicts in `_rows` of all batches, (positions, 5); padding has none."""
    (places,) = np.nonzero(rows[:, 0] > 0)
    label, prediction, confidence, certainty = rows[places, 1:].T
    return Verdicts(
        indices=places,
        labels=label.astype(np.int64),
        predictions=prediction.astype(np.int64),
        confidence=confidence,
        certainty=certainty,
    )


def _rank(logits: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """How many classes have a larger logit than an example's best label, and which label that is.

    `logits` and `targets` are (b, C); an example's labels are the classes with a target above 0.

    Returns:
      int32 (b,), 0 for a hit; and int32 (b, 1), a class number.
    """
    # A mixed or multi-label target has several labels: the one with the largest logit is judged.
    label_logits = tf.where(targets > 0, logits, logits.dtype.min)
    first = tf.argmax(label_logits, -1, tf.int32)[:, None]
    best = tf.gather(label_logits, first, batch_dims=1)
    # Of equal logits the class with the smaller number is ahead, as in argmax.
    ahead = (logits > best) | ((logits == best) & (tf.range(logits.shape[-1]) < first))
    # Comparisons with NaN are false, which would make a model of NaN always right.
    ahead |= tf.math.is_nan(logits) | tf.math.is_nan(best)
    return tf.reduce_sum(tf.cast(ahead, tf.int32), -1), first
