"""Metrics of a classifier's logits: top-k, by class, and calibration."""

from collections.abc import Sequence

import numpy as np

from vit_dist.evaluators.calibration import (
    calibration_error,
    fit_temperature,
    log_probabilities,
    mean_loss,
)
from vit_dist.evaluators.checks import at_least_one, each_positive
from vit_dist.evaluators.named import Named
from vit_dist.evaluators.outputs import Outputs

_CONFIDENCE = ("loss", "ece")  # the metrics of `_confidence`


def make_predictions(
    *,
    top: Sequence[int] = (1, 5),
    bins: int = 15,
    temperature: bool = True,
    per_class: bool = False,
) -> Named:
    """Makes a function of logits that counts hits and tells how well confidence fits them.

    Args:
      top: k of the top-k accuracies; those that are no smaller than the number of classes are left
        out, as they are always 1.
      bins: of the calibration error.
      temperature: whether to fit a temperature to the examples judged.
      per_class: whether to give each class's accuracy.

    Returns:
      A function whose metrics are "accuracy" and "topK_accuracy"; "mean_class_accuracy", over the
      classes that have examples; "loss", in nats; "ece"; with `temperature` "temperature",
      "scaled_loss" and "scaled_ece", of the logits divided by it; with `per_class`
      "accuracy/CLASS". Confidence is softmax's, whatever the training's loss.

    Raises:
      ConfigError: a number that cannot be used.
    """
    each_positive("top", top, kind=int)
    at_least_one("bins", bins)

    def evaluate(judged: Outputs) -> dict[str, float]:
        logits, labels = judged.values, judged.labels
        ranks = label_ranks(logits, labels)
        hits = ranks < 1
        found = top_accuracies(ranks, top, logits.shape[1])
        counts = np.bincount(labels, minlength=len(judged.class_names))
        right = np.bincount(labels, weights=hits, minlength=len(judged.class_names))
        present = counts > 0
        shares = right[present] / counts[present]
        found["mean_class_accuracy"] = float(shares.mean())
        found |= _confidence(logits, labels, hits, bins)
        if temperature:
            found["temperature"] = fit_temperature(logits, labels)
            # In float64, as the temperature was fitted.
            divided = logits / np.float64(found["temperature"])
            scaled = _confidence(divided, labels, hits, bins)
            found |= {f"scaled_{key}": value for key, value in scaled.items()}
        if per_class:
            names = [n for n, has in zip(judged.class_names, present, strict=True) if has]
            found |= {f"accuracy/{n}": float(s) for n, s in zip(names, shares, strict=True)}
        return found

    def names(class_names: Sequence[str], num_train: int) -> Sequence[str]:
        tops = top_names(top, len(class_names)).values()
        found = ["accuracy", *tops, "mean_class_accuracy", *_CONFIDENCE]
        if temperature:
            found += ["temperature", *(f"scaled_{key}" for key in _CONFIDENCE)]
        return [*found, *(f"accuracy/{name}" for name in class_names if per_class)]

    return Named(evaluate, names)


def top_accuracies(ranks: np.ndarray, top: Sequence[int], num_classes: int) -> dict[str, float]:
    """The share of examples whose label is the likeliest class, and by name those of top-k."""
    names = {1: "accuracy", **top_names(top, num_classes)}
    return {name: float((ranks < k).mean()) for k, name in names.items()}


def top_names(top: Sequence[int], num_classes: int) -> dict[int, str]:
    """By k, the name of its top-k accuracy, of those that are neither 1 nor always right."""
    return {k: f"top{k}_accuracy" for k in sorted(set(top) - {1}) if k < num_classes}


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes have a larger logit than each example's label: int (N,), 0 for a hit.

    As in evaluators.classification: of equal logits the class with the smaller number is ahead,
    and NaN is never a hit.
    """
    own = logits[np.arange(len(labels)), labels][:, np.newaxis]
    tied = (logits == own) & (np.arange(logits.shape[1]) < labels[:, np.newaxis])
    ahead = (logits > own) | tied | np.isnan(logits) | np.isnan(own)
    return ahead.sum(axis=1)


def _confidence(
    logits: np.ndarray, labels: np.ndarray, hits: np.ndarray, bins: int
) -> dict[str, float]:
    log_p = log_probabilities(logits)
    confidence = np.exp(log_p.max(axis=1))
    ece = calibration_error(confidence, hits, bins=bins)
    return {"loss": mean_loss(log_p, labels), "ece": ece}
