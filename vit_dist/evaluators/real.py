"""Accuracy where an example has a set of right labels (ReaL, arXiv 2006.07159)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vit_dist.config.errors import DataError
from vit_dist.evaluators.calibration import calibration_error, log_probabilities
from vit_dist.evaluators.checks import at_least_one, each_positive
from vit_dist.evaluators.named import Named
from vit_dist.evaluators.outputs import Outputs
from vit_dist.evaluators.predictions import label_ranks, top_accuracies, top_names


def make_real(*, top: Sequence[int] = (1, 5), bins: int = 15) -> Named:
    """Makes a function of logits and sets of labels that counts hits.

    Args:
      top: k of the top-k accuracies; those that are no smaller than the number of classes are left
        out.
      bins: of the calibration error.

    Returns:
      A function whose metrics are "accuracy", the share of examples whose likeliest class is among
      their labels; "topK_accuracy", of those that have a label among the K likeliest classes; and
      "ece". Examples without a label do not count: "examples" are the others.

    Raises:
      ConfigError: a number that cannot be used.
    """
    each_positive("top", top, kind=int)
    at_least_one("bins", bins)

    def evaluate(judged: Outputs) -> dict[str, float]:
        judged, _ = with_likeliest(judged)
        if not len(judged.labels):
            raise DataError("nothing to evaluate: no example has a right label")
        ranks = label_ranks(judged.values, judged.labels)
        found = top_accuracies(ranks, top, judged.values.shape[1])
        confidence = np.exp(log_probabilities(judged.values).max(axis=1))
        found["ece"] = calibration_error(confidence, ranks < 1, bins=bins)
        return {**found, "examples": float(len(ranks))}

    def names(class_names: Sequence[str], num_train: int) -> Sequence[str]:
        return ("accuracy", *top_names(top, len(class_names)).values(), "ece")

    return Named(evaluate, names)


def with_likeliest(judged: Outputs) -> tuple[Outputs, np.ndarray]:
    """The examples that have a right label, each with that of its labels that is likeliest.

    A set is hit where its likeliest label is, for each k of top-k.

    Args:
      judged: logits (N, C), and labels bool (N, C).

    Returns:
      Outputs with labels int64 (M,); and which examples they are, int64 (M,).
    """
    (rows,) = np.nonzero(judged.labels.any(axis=1))
    values = judged.values[rows]
    # Of equal logits the label with the smaller number, as in argmax over all classes.
    likeliest = np.where(judged.labels[rows], values, -np.inf).argmax(axis=1)
    return dataclasses.replace(judged, values=values, labels=likeliest), rows
