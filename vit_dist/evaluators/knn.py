"""Nearest neighbours on frozen features, as DINO judges them (arXiv 2104.14294, eval_knn.py)."""

from collections.abc import Sequence

import numpy as np

from vit_dist.evaluators.checks import each_positive
from vit_dist.evaluators.named import Named
from vit_dist.evaluators.outputs import Outputs

_BLOCK = 1024  # examples judged at a time: 1024 similarities to 1.3 million others are 5 GB


def make_knn(*, k: Sequence[int] = (10, 20, 100, 200), temperature: float = 0.07) -> Named:
    """Makes a function of features that judges them by their neighbours among the training's.

    Similarity is the cosine. Each of the k most similar training examples votes for its class with
    a weight of exp(similarity / temperature); of classes with equal votes the first wins.

    Returns:
      A function (judged, train) -> "kK_accuracy" for each k of at most the number of training
      examples.

    Raises:
      ConfigError: a number that cannot be used.
    """
    each_positive("k", k, kind=int)
    each_positive("temperature", [temperature])

    def of_size(num_train: int) -> dict[int, str]:
        return {size: f"k{size}_accuracy" for size in sorted(set(k)) if size <= num_train}

    def evaluate(judged: Outputs, train: Outputs) -> dict[str, float]:
        names = of_size(len(train.labels))
        sizes = list(names)
        bank, rows = normalized(train.values), normalized(judged.values)
        hits = dict.fromkeys(sizes, 0)
        # An empty list has no largest k: too few training examples for any.
        for begin in range(0, len(rows) if sizes else 0, _BLOCK):
            block = slice(begin, begin + _BLOCK)
            similar = rows[block] @ bank.T
            nearest = _largest(similar, sizes[-1])
            weights = np.exp(np.take_along_axis(similar, nearest, axis=1) / np.float64(temperature))
            classes = train.labels[nearest]
            for size in sizes:
                votes = _votes(classes[:, :size], weights[:, :size], len(train.class_names))
                hits[size] += int((votes.argmax(axis=1) == judged.labels[block]).sum())
        return {names[size]: count / len(rows) for size, count in hits.items()}

    return Named(evaluate, lambda class_names, num_train: list(of_size(num_train).values()))


def normalized(features: np.ndarray) -> np.ndarray:
    """Features (N, F) divided by their lengths; zeros stay zeros."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(lengths, np.finfo(np.float32).tiny)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` largest entries of each row, the largest first: int (rows, count)."""
    # A partition finds them in linear time, and only they are sorted.
    found = np.argpartition(-values, count - 1, axis=1)[:, :count]
    found.sort(axis=1)  # of equally similar neighbours the first one in the source comes first
    order = np.argsort(-np.take_along_axis(values, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def _votes(classes: np.ndarray, weights: np.ndarray, num_classes: int) -> np.ndarray:
    """The sums of weights by class, (rows, num_classes), of classes and weights (rows, k)."""
    rows = np.arange(len(classes))[:, np.newaxis]
    flat = (rows * num_classes + classes).ravel()
    sums = np.bincount(flat, weights=weights.ravel(), minlength=len(classes) * num_classes)
    return sums.reshape(len(classes), num_classes)
