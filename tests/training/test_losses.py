"""Losses against SciPy."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import log_softmax

from vit_dist.config.errors import ConfigError
from vit_dist.training.losses import LOSSES, as_distribution, make_loss

RNG = np.random.default_rng(0)
LOGITS = (5 * RNG.standard_normal((4, 3))).astype(np.float32)
CLASSES = np.array([2, 0, 0, 1])
ONE_HOT = np.eye(3)[CLASSES]
MIXED = np.array([[0.3, 0.7, 0], [1, 0, 0], [0, 0.5, 0.5], [0.2, 0.2, 0.6]])
SEVERAL = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]])  # for sigmoid


def softmax(targets, logits):
    return -(targets * log_softmax(logits, axis=-1)).sum(-1)


def sigmoid(targets, logits):
    positive, negative = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
    return -(targets * positive + (1 - targets) * negative).sum(-1)


EXPECTED = {"softmax": softmax, "sigmoid": sigmoid}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("labels", "targets"),
    [(CLASSES, ONE_HOT), (ONE_HOT, ONE_HOT), (MIXED, MIXED), (SEVERAL, SEVERAL)],
    ids=["classes", "one_hot", "mixed", "several"],
)
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name, labels, targets, smoothing):
    loss = make_loss(name=name, label_smoothing=smoothing)
    actual = loss(tf.constant(LOGITS), tf.constant(labels))
    expected = EXPECTED[name](targets * (1 - smoothing) + smoothing / 3, LOGITS.astype(float))
    assert actual.dtype == tf.float32 and actual.shape == (4,)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_binary_cross_entropy_of_deit3(threshold):
    """Mean over the classes; each label whose share is above the threshold counts in full."""
    loss = make_loss(name="sigmoid", reduction="mean", threshold=threshold)
    expected = sigmoid((threshold < MIXED).astype(float), LOGITS.astype(float)) / 3
    np.testing.assert_allclose(loss(LOGITS, tf.constant(MIXED)), expected, rtol=1e-5)


def test_a_threshold_counts_what_smoothing_has_left():
    """timm's BinaryCrossEntropy smooths first, so that its targets are 0 and 1."""
    options = {"name": "sigmoid", "reduction": "mean", "label_smoothing": 0.1}
    loss = make_loss(**options, threshold=0.2)
    expected = sigmoid((MIXED * 0.9 + 0.1 / 3 > 0.2).astype(float), LOGITS.astype(float)) / 3
    np.testing.assert_allclose(loss(LOGITS, tf.constant(MIXED)), expected, rtol=1e-5)
    for threshold, words in ((0.0, "count all of them as right"), (0.95, "none of them as right")):
        with pytest.raises(ConfigError, match=words):
            make_loss(**options, threshold=threshold)(LOGITS, tf.constant(MIXED))


def test_a_threshold_hides_no_label_outside_of_the_classes():
    loss = make_loss(name="sigmoid", reduction="mean", threshold=0.0)
    found = loss(tf.zeros((2, 3)), tf.constant([2, 3]))
    assert np.isnan(found.numpy()).tolist() == [False, True]


def test_every_loss_is_compared():
    assert set(LOSSES) == set(EXPECTED)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_logits(name, dtype):
    logits = tf.cast(LOGITS, dtype)
    exact = tf.cast(logits, tf.float64).numpy()
    actual = make_loss(name=name)(logits, tf.constant(CLASSES))
    assert actual.dtype == tf.float32
    np.testing.assert_allclose(actual, EXPECTED[name](ONE_HOT, exact), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_stay_finite(name):
    logits = tf.constant([[1e4, -1e4, -1e4]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = make_loss(name=name)(logits, tf.constant([1]))
    np.testing.assert_allclose(loss, [2e4], rtol=1e-6)
    assert np.isfinite(tape.gradient(loss, logits)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_class_numbers_become_rows(dtype):
    rows = as_distribution(tf.constant(CLASSES.astype(dtype)), 3)
    assert rows.dtype == tf.float32
    np.testing.assert_array_equal(rows, ONE_HOT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "hinge"}, "loss 'hinge' is unknown; allowed: softmax, sigmoid"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, "got -0.1"),
        ({"name": "sigmoid", "reduction": "max"}, "reduction 'max' is unknown; allowed: sum, mean"),
        ({"name": "sigmoid", "threshold": 1.0}, r"threshold must be in \[0, 1\), or None, got 1.0"),
        ({"reduction": "mean"}, "for the sigmoid loss; 'softmax' takes"),
        ({"threshold": 0.0}, "for the sigmoid loss; 'softmax' takes"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(**options)
