"""Confusions and calibration are counted as scikit-learn and loops do, and drawn as counted."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from vit_dist.evaluators.calibration import calibration_error, reliability
from vit_dist.inspection.judged import confusions, draw_confusions, draw_reliability


def judged(classes, count=400):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, classes, count)
    taken = np.where(rng.random(count) < 0.6, labels, rng.integers(0, classes, count))
    return labels, taken


@pytest.mark.parametrize("classes", [2, 7])
def test_all_classes(classes):
    labels, predictions = judged(classes)
    shown, counts = confusions(labels, predictions, classes)
    assert shown.tolist() == list(range(classes))
    np.testing.assert_array_equal(counts, confusion_matrix(labels, predictions))


def test_of_many_classes_the_ones_with_most_errors():
    labels, predictions = judged(30)
    shown, counts = confusions(labels, predictions, 30, most=4)
    whole = confusion_matrix(labels, predictions)
    errors = whole.sum(0) + whole.sum(1) - 2 * np.diag(whole)
    assert set(errors[shown]) >= set(np.sort(errors)[-3:]) and shown.tolist() == sorted(shown)
    assert counts.shape == (5, 5) and counts.sum() == len(labels)
    np.testing.assert_array_equal(counts[:4, :4], whole[np.ix_(shown, shown)])
    others = np.setdiff1d(np.arange(30), shown)
    assert counts[0, 4] == whole[shown[0], others].sum()
    assert counts[4, 4] == whole[np.ix_(others, others)].sum()


def test_the_matrix_is_drawn_with_names_counts_and_shares():
    labels, predictions = np.array([0, 0, 0, 1]), np.array([0, 0, 2, 1])
    names = ("cat", "dog", "a name that is too long for an axis")
    axes, bar = draw_confusions(labels, predictions, names, title="val").axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog", "a name that is ..."]
    assert sorted((t.get_text(), t.get_position()) for t in axes.texts) == [
        ("1", (1, 1)), ("1", (2, 0)), ("2", (0, 0)),
    ]  # fmt: skip
    shares = axes.images[0].get_array().filled(np.nan)
    # No example is of the third class.
    np.testing.assert_allclose(shares, [[2 / 3, 0, 1 / 3], [0, 1, 0], [np.nan] * 3])
    assert axes.get_title() == "confusions of val" and "share" in bar.get_ylabel()


def test_reliability():
    rng = np.random.default_rng(2)
    confidence = rng.beta(4, 1, 500).astype(np.float32)
    confidence[0] = 1.0
    correct = rng.random(500) < confidence**2
    found = reliability(confidence, correct, bins=10)
    for i in range(10):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        assert found.counts[i] == inside.sum()
        if inside.any():
            assert found.accuracy[i] == pytest.approx(correct[inside].mean())
            assert found.confidence[i] == pytest.approx(confidence[inside].mean())
        else:
            assert np.isnan(found.accuracy[i]) and np.isnan(found.confidence[i])
    assert found.error == calibration_error(confidence, correct, bins=10)
    assert 0 in found.counts and found.counts.sum() == 500
    above, below = draw_reliability(*found, title="val").axes
    heights = [bar.get_height() for bar in above.patches]
    np.testing.assert_allclose(heights, found.accuracy)
    assert [bar.get_height() for bar in below.patches] == found.counts.tolist()
    assert above.get_title() == f"calibration of val: error (ECE) {found.error:.3f}"
