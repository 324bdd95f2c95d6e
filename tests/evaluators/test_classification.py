"""Each example counts exactly once, whatever the padding, the replicas and the labels."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import log_softmax, softmax

from vit_dist.evaluators import classification
from vit_dist.evaluators.classification import make_evaluator, metric_names
from vit_dist.evaluators.outputs import Outputs
from vit_dist.evaluators.verdicts import verdicts_of
from vit_dist.training.losses import make_loss

EXAMPLES, BATCH, CLASSES = 21, 8, 7  # the last of three batches holds five examples


class Linear(keras.Model):
    """Logits are the first pixels, changed by a weight that evaluate must read when called."""

    def build(self, input_shape=None):
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")
        self.built = True

    def call(self, x, training=False, seed=None):
        assert not training
        return x * self.scale


def preprocess(images):
    return tf.cast(images, tf.float32) / 10


def make_data(classes=CLASSES):
    rng = np.random.default_rng(0)
    return rng.integers(-50, 50, (EXAMPLES, classes)), rng.integers(0, classes, EXAMPLES)


def make_strategy(replicas):
    if replicas == 1:
        return tf.distribute.OneDeviceStrategy("CPU:0")
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def dataset_of(strategy, images, labels):
    """Batches with a mask; padding is all that could leak: NaN images, true labels."""
    missing = -len(images) % BATCH
    bad = np.full((missing, *images.shape[1:]), np.nan)
    padded = {
        "image": np.concatenate([images, bad]).astype(np.float32),
        "label": np.concatenate([labels, np.repeat(labels[:1], missing, axis=0)]),
        "mask": np.concatenate([np.ones(len(images)), np.zeros(missing)]).astype(np.float32),
    }
    share = BATCH // strategy.num_replicas_in_sync
    data = tf.data.Dataset.from_tensor_slices(padded).batch(share, drop_remainder=True)
    return strategy.distribute_datasets_from_function(lambda _: data)


def evaluate(images, labels, *, replicas=1, jit=False, loss="softmax", scale=1.0, look=None):
    strategy = make_strategy(replicas)
    with strategy.scope():
        model = Linear()
        model.build()
    run = make_evaluator(
        model,
        make_loss(name=loss),
        strategy=strategy,
        preprocess=preprocess,
        jit=jit,
        verdicts=look is not None,
    )
    model.scale.assign(scale)
    return run(dataset_of(strategy, images, labels), look=look)


def expected_metrics(images, labels):
    logits = images / 10.0
    targets = np.eye(images.shape[1])[labels] if labels.ndim == 1 else labels
    # Of equal logits the one with the lower number is ahead.
    order = np.argsort(-logits, axis=1, kind="stable")
    ranked = np.take_along_axis(targets > 0, order, axis=1)
    return {
        "accuracy": ranked[:, 0].mean(),
        "top5_accuracy": ranked[:, :5].any(1).mean(),
        "loss": -(targets * log_softmax(logits, axis=1)).sum(1).mean(),
        "examples": len(images),
    }


@pytest.mark.parametrize(("replicas", "jit"), [(1, True), (1, False), (2, True), (4, False)])
def test_metrics(replicas, jit):
    images, labels = make_data()
    actual = evaluate(images, labels, replicas=replicas, jit=jit)
    expected = expected_metrics(images, labels)
    assert actual == pytest.approx(expected, rel=1e-6)
    assert 0 < expected["accuracy"] < expected["top5_accuracy"] < 1
    assert all(type(value) is float for value in actual.values())


@pytest.mark.parametrize(("replicas", "jit"), [(1, True), (4, False)])
def test_verdicts_of_each_example_in_the_order_of_the_source(replicas, jit):
    images, labels = make_data()
    images[4] = images[4, 0]  # of equal logits the first is taken
    found = []
    metrics = evaluate(images, labels, replicas=replicas, jit=jit, look=found.append)
    assert metrics == pytest.approx(expected_metrics(images, labels), rel=1e-6)
    p = softmax(images / 10.0, axis=1)
    (verdicts,) = found
    assert verdicts.indices.tolist() == list(range(EXAMPLES))
    assert verdicts.labels.tolist() == labels.tolist()
    assert verdicts.predictions.tolist() == p.argmax(1).tolist()
    assert verdicts.hits.mean() == pytest.approx(metrics["accuracy"])
    np.testing.assert_allclose(verdicts.confidence, p.max(1), rtol=1e-5)
    np.testing.assert_allclose(verdicts.certainty, p[np.arange(EXAMPLES), labels], rtol=1e-5)
    # What was gathered on the host as logits gives the same.
    places = np.arange(EXAMPLES)
    again = verdicts_of(Outputs(images / 10.0, labels, tuple("abcdefg")), places)
    for one, other in zip(vars(verdicts).values(), vars(again).values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_verdicts_of_nan_have_the_true_label():
    images, labels = make_data()
    found = []
    evaluate(images, labels, scale=np.nan, look=found.append)
    assert found[0].labels.tolist() == labels.tolist()
    assert np.isnan(found[0].certainty).all()


def test_of_several_labels_the_likeliest_is_judged():
    images, _ = make_data()
    labels = np.zeros((EXAMPLES, CLASSES), np.float32)
    labels[:, 2], labels[:, 5] = 0.9, 0.1
    found = []
    evaluate(images, labels, look=found.append)
    assert found[0].labels.tolist() == np.where(images[:, 2] >= images[:, 5], 2, 5).tolist()


@pytest.mark.parametrize("replicas", [1, 2])
def test_several_labels_of_an_example(replicas):
    images, _ = make_data()
    draw = np.random.default_rng(1).uniform(size=images.shape)
    labels = np.where(draw < 0.2, 0.5 + draw, 0).astype(np.float32)  # soft ones, as of a teacher
    assert {0, 1, 2} <= set((labels > 0).sum(1))  # none at all, one, several
    actual = evaluate(images, labels, replicas=replicas)
    assert actual == pytest.approx(expected_metrics(images, labels), rel=1e-6)


@pytest.mark.parametrize(("classes", "present"), [(5, False), (6, True)])
def test_top5_needs_more_than_five_classes(classes, present):
    actual = evaluate(*make_data(classes))
    assert ("top5_accuracy" in actual) == present
    assert set(metric_names(classes)) == set(actual) - {"examples"}


def test_equal_logits_are_no_hits():
    # A head of zeros knows nothing: of 7 equal classes the first five are the top five.
    images, labels = make_data()
    actual = evaluate(0 * images, labels)
    assert actual["accuracy"] == pytest.approx(np.mean(labels == 0))
    assert actual["top5_accuracy"] == pytest.approx(np.mean(labels < 5))


@pytest.mark.parametrize("jit", [False, True])
def test_nan_is_no_hit(jit):
    actual = evaluate(*make_data(), scale=np.nan, jit=jit)
    assert np.isnan(actual["loss"])
    assert (actual["accuracy"], actual["top5_accuracy"]) == (0, 0)


def test_weights_are_read_when_called():
    images, labels = make_data()
    assert evaluate(images, labels, scale=-1.0) == pytest.approx(expected_metrics(-images, labels))


def test_the_loss_given_is_the_loss():
    images, labels = make_data()
    logits = images / 10.0
    targets = np.eye(CLASSES)[labels]
    expected = (np.logaddexp(0, logits) - targets * logits).sum(1).mean()
    assert evaluate(images, labels, loss="sigmoid")["loss"] == pytest.approx(expected)


def test_evaluating_twice_gives_the_same():
    images, labels = make_data()
    strategy = make_strategy(2)
    with strategy.scope():
        model = Linear()
        model.build()
    run = make_evaluator(model, make_loss(), strategy=strategy, preprocess=preprocess, jit=False)
    data = dataset_of(strategy, images, labels)
    assert run(data) == run(data)


@pytest.mark.parametrize("padding", [0, 1])
def test_nothing_to_evaluate(padding):
    strategy = make_strategy(1)
    model = Linear()
    model.build()
    run = make_evaluator(model, make_loss(), strategy=strategy, preprocess=preprocess, jit=False)
    zeros = {"image": np.zeros((BATCH, CLASSES)), "label": np.zeros(BATCH, int)}
    data = tf.data.Dataset.from_tensors({**zeros, "mask": np.zeros(BATCH, np.float32)})
    with pytest.raises(ValueError, match="nothing to evaluate: the split has no examples"):
        run(data.take(padding))


def test_rows_of_several_hosts_come_in_the_order_of_the_source(monkeypatch):
    # Batches, hosts, replicas of a host, examples of a replica, columns.
    rows = np.arange(3 * 2 * 2 * 4 * 5.0).reshape(3, 2, 2, 4, 5)

    class TwoReplicas:
        def experimental_local_results(self, batch):
            return tuple(tf.constant(part) for part in batch)

    def gathered(strategy, own):
        np.testing.assert_array_equal(own, rows[:, 0])
        return np.stack([rows[:, 0], rows[:, 1]])

    monkeypatch.setattr(classification, "all_hosts_arrays", gathered)
    joined = classification._joined(list(rows[:, 0]), TwoReplicas())
    np.testing.assert_array_equal(joined, rows.reshape(-1, 5))
