"""Each kind of evaluation agrees with scikit-learn, SciPy or plain NumPy on the same numbers."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, recall_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.config.recipe import ALEXNET_ERRORS
from vit_dist.evaluators import probe
from vit_dist.evaluators.calibration import HIGHEST, LOWEST, calibration_error, fit_temperature
from vit_dist.evaluators.named import Named
from vit_dist.evaluators.outputs import Outputs, without_absent
from vit_dist.evaluators.predictions import label_ranks
from vit_dist.evaluators.registry import KINDS
from vit_dist.evaluators.verdicts import verdicts_of

CLASSES, WIDTH = 6, 12
NAMES = tuple("abcdef")


def features(count, seed, *, width=WIDTH):
    """Features of classes that overlap, so that no accuracy is 0 or 1; they are not centred."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    centers = np.random.default_rng(0).normal(size=(CLASSES, width))
    values = 3 + 0.7 * centers[labels] + rng.normal(size=(count, width))
    return Outputs(values.astype(np.float32), labels, NAMES)


def logits(count=500, scale=3.0):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, count)
    values = rng.normal(size=(count, CLASSES)) + 1.2 * np.eye(CLASSES)[labels]
    return Outputs((scale * values).astype(np.float32), labels, NAMES)


TRAIN, JUDGED = features(300, 1), features(200, 2)


def run(kind, *arguments, **options):
    return KINDS[kind].make(**options)(*arguments)


def test_classification():
    judged = logits()
    found = run("classification", judged, top=(1, 2, 5, 6), per_class=True)
    p = softmax(judged.values.astype(np.float64), axis=1)
    top = {k: top_k_accuracy_score(judged.labels, p, k=k) for k in (1, 2, 5)}
    assert found["accuracy"] == pytest.approx(top[1]) and 0.2 < top[1] < 0.8
    assert found["top2_accuracy"] == pytest.approx(top[2])
    assert found["top5_accuracy"] == pytest.approx(top[5])
    assert "top6_accuracy" not in found  # always 1
    recalls = recall_score(judged.labels, p.argmax(1), average=None)
    assert [found[f"accuracy/{name}"] for name in NAMES] == pytest.approx(list(recalls))
    assert found["mean_class_accuracy"] == pytest.approx(recalls.mean())
    assert found["loss"] == pytest.approx(log_loss(judged.labels, p), abs=1e-9)


def test_a_class_without_examples_is_left_out():
    judged = logits()
    kept = judged.labels != 2
    part = Outputs(judged.values[kept], judged.labels[kept], NAMES)
    found = run("classification", part, per_class=True)
    each = [v for k, v in found.items() if k.startswith("accuracy/")]
    assert "accuracy/c" not in found and len(each) == 5
    assert found["mean_class_accuracy"] == pytest.approx(np.mean(each))


def sets(judged, seed=5):
    """Sets of 0 to 4 labels, which hold the old label or not."""
    rng = np.random.default_rng(seed)
    drawn = rng.random((len(judged.labels), CLASSES)) < rng.choice([0, 0.2, 0.5], (500, 1))
    assert not drawn.any(1).all() and drawn.sum(1).max() > 3
    return Outputs(judged.values, drawn, NAMES)


def test_accuracy_with_sets_of_labels():
    """The formula of google-research/reassessed-imagenet, and top-k as timm counts it."""
    judged = sets(logits())
    found = run("real", judged, top=(1, 2, 3, 6))
    real_labels = [list(np.flatnonzero(row)) for row in judged.labels]
    predictions = judged.values.argmax(-1)
    is_correct = [p in real_labels[i] for i, p in enumerate(predictions) if real_labels[i]]
    assert found["accuracy"] == np.mean(is_correct) and 0.2 < found["accuracy"] < 0.8
    order = np.argsort(-judged.values, axis=1)
    for k in (2, 3):
        hit = [any(c in r for c in o[:k]) for o, r in zip(order, real_labels, strict=True) if r]
        assert found[f"top{k}_accuracy"] == np.mean(hit)
    assert set(found) == {"accuracy", "top2_accuracy", "top3_accuracy", "ece", "examples"}
    assert found["examples"] == len(is_correct) < 500
    kept = judged.labels.any(1)
    p = softmax(judged.values[kept].astype(np.float64), axis=1)
    confidence = calibration_error(p.max(1), np.array(is_correct), bins=15)
    assert found["ece"] == pytest.approx(confidence, abs=1e-12)
    # What pictures show of it.
    verdicts = verdicts_of(judged, 10 + np.arange(500))
    assert (verdicts.indices == 10 + np.flatnonzero(kept)).all()
    assert verdicts.hits.tolist() == is_correct


def test_examples_without_any_label_are_nothing_to_judge():
    judged = logits()
    with pytest.raises(DataError, match="no example has a right label"):
        run("real", Outputs(judged.values, np.zeros((500, CLASSES), bool), NAMES))


def test_classes_that_are_absent():
    """As accuracies on ImageNet-A and -R are published: among the classes that they have."""
    judged = logits()
    part = judged.labels < 3
    values, labels = judged.values[part], judged.labels[part]
    found = run("classification", Outputs(without_absent(values, labels), labels, NAMES), top=(2,))
    chosen = run("classification", Outputs(values[:, :3], labels, NAMES[:3]), top=(2,))
    assert found == pytest.approx(chosen, abs=1e-9)
    assert found["accuracy"] > run("classification", Outputs(values, labels, NAMES))["accuracy"]
    rows = np.eye(CLASSES, dtype=bool)[labels]
    assert (without_absent(values, rows) == without_absent(values, labels)).all()


def test_corruption_error_of_published_numbers():
    """ResNet-50 in the table of the paper: its CE by corruption, and mCE 76.7."""
    ce = (80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77)
    pairs = zip(ALEXNET_ERRORS.items(), ce, strict=True)
    errors = {name: c / 100 * error for (name, error), c in pairs}
    # Severities around the mean.
    spread = dict(zip("12345", (-0.1, -0.05, 0, 0.05, 0.1), strict=True))
    of = {name: [f"{name}_{s}" for s in spread] for name in errors}
    found = {
        f"{name}_{s}": {"accuracy": 1 - error - off}
        for name, error in errors.items()
        for s, off in spread.items()
    }
    got = run("corruption_error", found, of=of, baseline=ALEXNET_ERRORS)
    assert got["mce"] == pytest.approx(np.mean(ce) / 100) == pytest.approx(0.767, abs=3e-3)
    assert got["mean_error"] == pytest.approx(np.mean(list(errors.values())))
    assert got["error/fog"] == pytest.approx(0.66 * 0.819324)
    assert "mce" not in run("corruption_error", found, of=of)


# Kind, options, what it judges, how many metrics.
TOLD = [
    ("classification", {}, (logits(),), 8),
    ("classification", {"top": (1, 2, 3, 6), "temperature": False}, (logits(),), 6),
    ("classification", {"per_class": True}, (logits(),), 14),
    ("real", {}, (sets(logits()),), 3),
    ("knn", {"k": (3, 9, 301)}, (JUDGED, TRAIN), 2),
    ("fewshot", {"shots": (1, 5)}, (JUDGED, TRAIN), 2),
    ("fewshot", {"shots": (1, 5), "l2": (1.0, 8.0), "num_seeds": 1}, (JUDGED, TRAIN), 4),
    ("linear_probe", {"l2": (1e-2, 1.0)}, (JUDGED, TRAIN), 4),
    (
        "corruption_error",
        {"of": {"fog": ("x",)}, "baseline": {"fog": 0.5}},
        ({"x": {"accuracy": 0.5}},),
        3,
    ),
]


@pytest.mark.parametrize("kind, options, judged, count", TOLD)
def test_metrics_are_told_before(kind, options, judged, count):
    evaluate = KINDS[kind].make(**options)
    told = evaluate.names(NAMES, len(TRAIN.labels) if len(judged) > 1 else 0)
    assert sorted(told) == sorted(set(evaluate(*judged)) - {"examples"})
    assert len(told) == count


def test_every_kind_tells_its_metrics():
    assert {kind for kind, *_ in TOLD} == set(KINDS)
    assert all(isinstance(KINDS[kind].make(**options), Named) for kind, options, *_ in TOLD)


def ece_by_loops(p, labels, bins):
    """As Guo et al. write it: bin by bin."""
    confidence, correct = p.max(1), p.argmax(1) == labels
    total = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error(bins):
    judged = logits()
    p = softmax(judged.values.astype(np.float64), axis=1)
    expected = ece_by_loops(p, judged.labels, bins)
    assert run("classification", judged, bins=bins)["ece"] == pytest.approx(expected, abs=1e-12)
    assert expected > 0.05


def test_an_edge_belongs_to_the_bin_below():
    confidence, correct = np.array([0.5, 0.75]), np.array([True, False])
    # Bins (0, 0.5] and (0.5, 1]: gaps of 0.5 and 0.75, half of the examples each.
    assert calibration_error(confidence, correct, bins=2) == 0.5 * 0.5 + 0.5 * 0.75
    assert calibration_error(confidence, correct, bins=1) == abs(0.5 - 0.625)


def test_the_temperature_is_the_most_likely():
    judged = logits(scale=5.0)
    values, rows = judged.values.astype(np.float64), np.arange(len(judged.labels))

    def loss(t):
        return -log_softmax(values / t, axis=1)[rows, judged.labels].mean()

    best = minimize_scalar(loss, bounds=(0.1, 50), method="bounded", options={"xatol": 1e-9})
    found = run("classification", judged)
    assert found["temperature"] == pytest.approx(best.x, rel=1e-6) and best.x > 2
    assert found["scaled_loss"] == pytest.approx(best.fun, abs=1e-12)
    scaled = softmax(values / found["temperature"], axis=1)
    assert found["scaled_ece"] == pytest.approx(ece_by_loops(scaled, judged.labels, 15), abs=1e-9)


def test_temperatures_without_an_end():
    labels = np.array([0, 1])
    right = 4.0 * np.eye(2, dtype=np.float32)
    # The likelihood rises to the limit, but in float64 it is 1 long before.
    assert LOWEST <= fit_temperature(right, labels) < 0.2
    assert fit_temperature(-right, labels) == pytest.approx(HIGHEST, rel=1e-3)
    assert np.isnan(fit_temperature(right * np.nan, labels))


def test_ranks_of_ties_and_nan():
    values = np.array([[1, 1, 1], [1, 1, 2], [np.nan, 5, 1]], np.float32)
    assert label_ranks(values, np.array([1, 2, 1])).tolist() == [1, 0, 1]
    found = run("classification", Outputs(values * np.nan, np.zeros(3, int), ("a", "b", "c")))
    assert found["accuracy"] == 0 and np.isnan(found["loss"]) and np.isnan(found["ece"])


def test_knn():
    sizes = (1, 5, 20, 300)
    found = run("knn", JUDGED, TRAIN, k=(*sizes, 301))
    assert set(found) == {f"k{k}_accuracy" for k in sizes}  # there are no 301 neighbours
    # scikit-learn's distance is 1 - cosine; the constant cancels among the votes.
    for k in sizes:
        model = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        model.fit(TRAIN.values.astype(np.float64), TRAIN.labels)
        expected = model.score(JUDGED.values.astype(np.float64), JUDGED.labels)
        assert found[f"k{k}_accuracy"] == expected, k
    assert len({*found.values()}) > 2


def test_knn_in_several_blocks(monkeypatch):
    expected = run("knn", JUDGED, TRAIN, k=(3, 9))
    monkeypatch.setattr("vit_dist.evaluators.knn._BLOCK", 64)  # 200 examples: the last one has 8
    assert run("knn", JUDGED, TRAIN, k=(3, 9)) == expected


def fewshot_by_ridge(shots, l2, seed):
    """scikit-learn's Ridge with the bias as a feature of 100, as big_vision has it."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.where(TRAIN.labels == c)[0])[:shots] for c in range(CLASSES)]
    rows = np.concatenate(rows)
    x = TRAIN.values[rows].astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5

    def prepared(values):
        return np.hstack([(values - mean) / std, np.full((len(values), 1), 100.0)])

    targets = 2 * np.eye(CLASSES)[TRAIN.labels[rows]] - 1
    model = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(prepared(x), targets)
    return (model.predict(prepared(JUDGED.values)).argmax(1) == JUDGED.labels).mean()


def test_fewshot():
    # 6 and 12 examples are fewer than the 13 features, 60 and 150 are more: both forms.
    found = run("fewshot", JUDGED, TRAIN, shots=(1, 2, 10, 25))
    for shots in (1, 2, 10, 25):
        expected = np.mean([fewshot_by_ridge(shots, 2.0**10, seed) for seed in range(3)])
        assert found[f"{shots}shot_accuracy"] == pytest.approx(expected, abs=1e-12), shots
    assert found["1shot_accuracy"] < found["25shot_accuracy"]


def test_fewshot_with_several_penalties():
    found = run("fewshot", JUDGED, TRAIN, shots=(5,), l2=(1.0, 1e5), num_seeds=1)
    for l2, name in ((1.0, "1"), (1e5, "100000")):
        expected = fewshot_by_ridge(5, l2, 0)
        assert found[f"5shot_l2_{name}_accuracy"] == pytest.approx(expected, abs=1e-12)


def sklearn_probe(train, l2):
    count = 1 / (l2 * len(train.labels))
    model = LogisticRegression(C=count, solver="newton-cg", tol=1e-10, max_iter=1000)
    return model.fit(train.values.astype(np.float64), train.labels)


def test_linear_probe():
    penalties = (1e-4, 1e-2, 1.0)
    options = {"tolerance": 1e-9, "max_iterations": 5000}
    weights = probe.fit(TRAIN.values, TRAIN.labels, CLASSES, np.array(penalties), **options)
    x = np.pad(JUDGED.values.astype(np.float64), ((0, 0), (0, 1)), constant_values=1)
    found = run("linear_probe", JUDGED, TRAIN, l2=penalties)
    for l2, w in zip(penalties, weights, strict=True):
        model = sklearn_probe(TRAIN, l2)
        expected = model.predict_proba(JUDGED.values.astype(np.float64))
        np.testing.assert_allclose(softmax(x @ w, axis=1), expected, atol=1e-6)
        score = model.score(JUDGED.values.astype(np.float64), JUDGED.labels)
        assert found[f"l2_{l2:g}_accuracy"] == score
    assert found["accuracy"] == found[f"l2_{found['l2']:g}_accuracy"]


def test_the_penalty_is_chosen_without_the_examples_judged():
    """With judged labels that are wrong on purpose the choice stays what it was."""
    wrong = Outputs(JUDGED.values, (JUDGED.labels + 1) % CLASSES, NAMES)
    penalties = (1e-3, 1e-1, 10.0)
    right = run("linear_probe", JUDGED, TRAIN, l2=penalties)
    assert run("linear_probe", wrong, TRAIN, l2=penalties)["l2"] == right["l2"] != 10.0


def test_problems_that_converge_drop_out_and_change_nothing():
    options = {"tolerance": 1e-8, "max_iterations": 3000}
    both = np.array([1e-3, 10.0])
    together = probe.fit(TRAIN.values, TRAIN.labels, CLASSES, both, **options)
    for i in range(2):
        alone = probe.fit(TRAIN.values, TRAIN.labels, CLASSES, both[i : i + 1], **options)
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("classification", {"top": ()}, "top must be a list of whole numbers above 0, got"),
        ("classification", {"top": 1}, "top must be a list of whole numbers above 0, got 1"),
        ("classification", {"top": "15"}, "top must be a list of whole numbers"),
        ("classification", {"bins": 0}, "bins must be a whole number above 0, got 0"),
        ("real", {"top": (0,)}, "top must be a list of whole numbers above 0"),
        ("corruption_error", {"of": {}}, "of must name groups of evaluations"),
        ("corruption_error", {"of": {"fog": "fog_1"}}, r"of\['fog'\] must be a list of names"),
        (
            "corruption_error",
            {"of": {"fog": ("fog_1",)}, "baseline": {"frog": 0.5}},
            r"baseline must give an error for each group of `of`: \['fog'\], got \['frog'\]",
        ),
        (
            "corruption_error",
            {"of": {"fog": ("fog_1",)}, "baseline": {"fog": 81.9}},
            r"baseline\['fog'\] must be a share in \(0, 1\], got 81.9",
        ),
        ("knn", {"k": (0,)}, "k must be a list of whole numbers above 0"),
        ("knn", {"k": (True,)}, "k must be a list of whole numbers above 0"),
        ("knn", {"temperature": 0.0}, "temperature must be .* above 0"),
        ("fewshot", {"shots": (1.5,)}, "shots must be a list of whole numbers"),
        ("fewshot", {"l2": (float("nan"),)}, "l2 must be a list of numbers above 0"),
        ("fewshot", {"num_seeds": 0}, "num_seeds must be"),
        ("linear_probe", {"l2": (-1.0,)}, "l2 must be a list of numbers above 0"),
        ("linear_probe", {"held_out": 1.0}, r"held_out must be in \(0, 1\), got 1.0"),
    ],
)
def test_mistakes(kind, options, words):
    with pytest.raises(ConfigError, match=words):
        KINDS[kind].make(**options)
