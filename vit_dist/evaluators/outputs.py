"""What a model gives for the examples of a split, gathered on the host in the source's order."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist.config.errors import DataError
from vit_dist.training.step import compiled, without_grappler


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What an evaluator judges: N examples, each once, without padding and unreadable images.

    Attributes:
      values: float32 (N, F) features, or (N, C) logits of the C classes in class_names.
      labels: int64 (N,), each in [0, C); bool (N, C) for kinds that judge sets of labels.
      class_names: in the order of the labels.
    """

    values: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


def without_absent(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logits (N, C) in which no class without examples is ever predicted.

    Args:
      values: logits.
      labels: as in Outputs.

    Returns:
      The logits, those of classes that are nobody's label being the least number of float32. It is
      finite, so that a probability of 0 times such a logit is 0, and the classes keep their places.
    """
    if labels.ndim == 2:
        present = labels.any(axis=0)
    else:
        present = np.bincount(labels, minlength=values.shape[1]) > 0
    return np.where(present, values, np.finfo(np.float32).min)


# Of a data set: values (N, F) and labels as in Outputs, and the place of each example in its
# source, int64 (N,), rising.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_collector(
    function: Callable[[tf.Tensor], tf.Tensor],
    *,
    strategy: tf.distribute.Strategy,
    preprocess: Callable[[tf.Tensor], tf.Tensor],
    jit: bool = True,
) -> Callable[..., Arrays | None]:
    """Makes collect(dataset, stop=...) -> (values, labels, indices), for data sets of one pipe.

    Args:
      function: images as the model takes them -> (b, F): its features or its logits.
      strategy: its replicas share the work.
      preprocess: images as the input delivers them (uint8) -> as the model takes them; on device.
      jit: compile with XLA.

    Returns:
      A function of a distributed data set of {"image", "label", "mask"}, with labels (b,) that are
      class numbers, or rows (b, C) with 1 for each right class. Every host gets all examples.
      `stop` is called after each batch, on every host; if it returns true, the collection is given
      up and the function returns None.
    """

    def of_images(images: tf.Tensor) -> tf.Tensor:
        return tf.cast(function(preprocess(images)), tf.float32)

    # TPUStrategy compiles everything itself.
    whole = jit and not isinstance(strategy, tf.distribute.TPUStrategy)
    one_replica = compiled(of_images) if whole else of_images

    def of_replica(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {**{k: batch[k] for k in ("label", "mask")}, "value": one_replica(batch["image"])}

    @tf.function(autograph=False)
    def step(batch: Any) -> dict[str, tf.Tensor]:
        # An element of the data set holds the replicas' shares of a global batch in the order of
        # the replicas, and gather joins them in that order: the order of the source.
        out = strategy.run(of_replica, args=(batch,))
        return {k: strategy.gather(v, axis=0) for k, v in out.items()}

    run_step = without_grappler(step) if whole else step

    def collect(dataset: Any, *, stop: Callable[[], bool] = lambda: False) -> Arrays | None:
        values, labels, indices = [], [], []
        seen = 0
        for batch in dataset:
            out = {k: v.numpy() for k, v in run_step(batch).items()}
            # Padding, and examples that cannot be read, have a mask of 0.
            kept = out["mask"] > 0
            values.append(out["value"][kept])
            kind = np.int64 if out["label"].ndim == 1 else np.bool_
            labels.append(out["label"][kept].astype(kind))
            # An example's place in the data set, which has the order of the source, padding last.
            indices.append(seen + np.flatnonzero(kept))
            seen += len(kept)
            if stop():
                return None
        if not sum(map(len, labels)):
            raise DataError(
                "nothing to evaluate: the split has no examples, or all of them are masked"
            )
        return np.concatenate(values), np.concatenate(labels), np.concatenate(indices)

    return collect
