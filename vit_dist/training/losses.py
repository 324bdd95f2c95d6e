"""Classification losses, one number per example; the step sums and divides (law 2)."""

from collections.abc import Callable

import tensorflow as tf

from vit_dist.config.errors import ConfigError

# (logits (b, C), labels (b,) or (b, C)) -> (b,).
Loss = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def _softmax(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.softmax_cross_entropy_with_logits(labels, logits)


def _sigmoid(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    # Summed over the classes, as in AugReg (arXiv 2106.10270); torch's BCE takes the mean.
    return tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits), axis=-1)


LOSSES: dict[str, Loss] = {"softmax": _softmax, "sigmoid": _sigmoid}
REDUCTIONS = ("sum", "mean")


def as_distribution(labels: tf.Tensor, num_classes: int) -> tf.Tensor:
    """Labels as float32 (b, C): class numbers (b,) become one-hot rows, rows (b, C) stay.

    A number outside of 0..C-1 becomes a row of NaN, so that its step ends the run as not finite.
    tf.one_hot would make it a row of zeros, which trains towards no class without a word.
    """
    if labels.shape.rank == 1:
        known = (labels >= 0) & (labels < num_classes)
        return tf.where(known[:, tf.newaxis], tf.one_hot(labels, num_classes), float("nan"))
    return tf.cast(labels, tf.float32)


def check_threshold(smoothing: float, threshold: float | None, *, num_classes: int) -> None:
    """Checks that a threshold tells the right class from the others once labels are smoothed.

    Raises:
      ConfigError: all classes would count as right, or none.
    """
    if threshold is None:
        return
    others = smoothing / num_classes
    right = 1 - smoothing + others
    if not others <= threshold < right:
        raise ConfigError(
            f"loss.label_smoothing={smoothing} gives the right one of {num_classes} classes "
            f"{right:.3g} and each other one {others:.3g}: loss.threshold={threshold} would count "
            f"{'all' if others > threshold else 'none'} of them as right; set it between the two, "
            "or loss.label_smoothing to 0"
        )


def make_loss(
    *,
    name: str = "softmax",
    label_smoothing: float = 0.0,
    reduction: str = "sum",
    threshold: float | None = None,
) -> Loss:
    """Makes loss(logits, labels) -> float32 (b,).

    Args:
      name: "softmax" cross-entropy, or "sigmoid": binary cross-entropy over the classes.
      label_smoothing: s in labels * (1 - s) + s / C (arXiv 1512.00567), for both losses.
      reduction: of "sigmoid" over the classes: "sum" as AugReg, "mean" as PyTorch and DeiT III.
      threshold: of "sigmoid": the share that a label gives a class counts as 1 if it is above the
        threshold, else as 0. 0.0 is DeiT III's: an image mixed of two has both labels in full.
        None takes shares as they are.

    Returns:
      A function of logits (b, C), any float type, and labels, int (b,) or float (b, C).

    Raises:
      ConfigError: unknown name or reduction, a number out of range, or an option of "sigmoid" given
        for "softmax".
    """
    if name not in LOSSES:
        raise ConfigError(f"loss {name!r} is unknown; allowed: {', '.join(LOSSES)}")
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"loss.label_smoothing must be in [0, 1), got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ConfigError(
            f"loss.reduction {reduction!r} is unknown; allowed: {', '.join(REDUCTIONS)}"
        )
    if threshold is not None and not 0 <= threshold < 1:
        raise ConfigError(f"loss.threshold must be in [0, 1), or None, got {threshold}")
    if name != "sigmoid" and (reduction != "sum" or threshold is not None):
        raise ConfigError(
            f"loss.reduction and loss.threshold are for the sigmoid loss; {name!r} takes "
            "reduction 'sum' and threshold None"
        )

    def loss(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        # Half precision would round a loss near 0 away, and overflow in the sum over 21k classes.
        logits = tf.cast(logits, tf.float32)
        num_classes = logits.shape[-1]
        # timm's order of operations: mixup (done by the step), then smoothing, then the threshold.
        targets = as_distribution(labels, num_classes)
        check_threshold(label_smoothing, threshold, num_classes=num_classes)
        if label_smoothing:
            targets = targets * (1 - label_smoothing) + label_smoothing / num_classes
        if threshold is not None:
            # Not a number is not above it either, and has to stay: see as_distribution.
            above = tf.cast(targets > threshold, tf.float32)
            targets = tf.where(tf.math.is_nan(targets), targets, above)
        each = LOSSES[name](targets, logits)
        return each / num_classes if reduction == "mean" else each

    return loss
