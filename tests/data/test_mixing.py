"""Mixup and CutMix against NumPy restatements of the published code; the same on any replicas."""

import shutil

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from tests.support.stepping import BATCH, CLASSES, IMAGES, LABELS, Engine, Net, make_net, preprocess
from tests.support.tiny import make, without_evaluation
from vit_dist.data import pipeline
from vit_dist.data.mixing import IDENTITY, MODES, check_groups, cutmix_rows, make_mixing
from vit_dist.data.ops import pipe
from vit_dist.data.sources.open import open_source
from vit_dist.run.check import check
from vit_dist.train import train
from vit_dist.training.losses import make_loss

SIZE = (9, 14)  # height, width
DEIT = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def draw(step=0, *, seed=0, batch_size=64, **options):
    return make_mixing(**options).draw(step, seed=seed, batch_size=batch_size, size=SIZE).numpy()


def timm_box(share, cy, cx, height, width):
    """Box and corrected lambda, restated from the description of timm's rand_bbox."""
    cut = [int(n * np.sqrt(1 - share)) for n in (height, width)]
    y = np.clip([cy - cut[0] // 2, cy + cut[0] // 2], 0, height)
    x = np.clip([cx - cut[1] // 2, cx + cut[1] // 2], 0, width)
    return (*y, *x), 1 - (y[1] - y[0]) * (x[1] - x[0]) / (height * width)


def timm_mix(images, labels, params, smoothing):
    """Each example with its flip partner; params: (lambda, box or None) of each example."""
    off = smoothing / CLASSES
    on_off = np.full((len(labels), CLASSES), off)
    on_off[np.arange(len(labels)), labels] = 1 - smoothing + off
    mixed, targets = images.astype(np.float64), np.zeros_like(on_off)
    for i, (share, box) in enumerate(params):
        j = len(images) - 1 - i
        if box is None:
            mixed[i] = images[i] * share + images[j] * (1.0 - share)
        else:
            top, bottom, left, right = box
            mixed[i, top:bottom, left:right] = images[j, top:bottom, left:right]
        targets[i] = on_off[i] * share + on_off[j] * (1 - share)
    return mixed, targets


def test_boxes_are_timms():
    random = np.random.default_rng(0)
    shares = np.concatenate([[0.0, 1.0, 0.5], random.beta(1, 1, 200)])
    ys, xs = (random.integers(0, n, len(shares)) for n in SIZE)
    rows = cutmix_rows(shares, tf.constant(ys, tf.int32), tf.constant(xs, tf.int32), size=SIZE)
    for row, share, y, x in zip(rows.numpy(), shares, ys, xs, strict=True):
        box, corrected = timm_box(share, y, x, *SIZE)
        assert tuple(row[2:]) == box and row[1] == 1
        assert row[0] == np.float32(corrected)


# Each form of smoothing; XLA for the mode whose rows differ most.
@pytest.mark.parametrize(
    ("mode", "smoothing", "jit"),
    [
        pytest.param(mode, smoothing, jit, marks=pytest.mark.exhaustive)
        if jit and mode != "elem"
        else (mode, smoothing, jit)
        for mode in MODES
        for smoothing, jit in ((0.0, False), (0.1, True))
    ],
)
def test_images_and_labels_are_timms(mode, smoothing, jit):
    """Our neighbours 2k, 2k + 1 are timm's k, B - 1 - k."""
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (8, *SIZE, 3)).astype(np.float32)
    labels = random.integers(0, CLASSES, 8)
    mixing = make_mixing(mode=mode, probability=0.9, **DEIT)
    rows = mixing.draw(3, seed=5, batch_size=8, size=SIZE)
    place = np.stack([np.arange(4), 7 - np.arange(4)], 1).reshape(-1)  # ours -> timm's

    @tf.function(jit_compile=jit)
    def ours(images, labels, rows):
        return mixing.images(images, rows), mixing.labels(labels, rows)

    have, targets = ours(images[place], tf.one_hot(labels[place], CLASSES), rows)
    targets = targets * (1 - smoothing) + smoothing / CLASSES  # as losses.make_loss has it
    params = [None] * 8
    for i, row in zip(place, rows.numpy(), strict=True):
        box = row[2:].astype(int)
        params[i] = (np.float64(row[0]), tuple(box) if row[1] == 1 else None)
    want, want_targets = timm_mix(images, labels, params, smoothing)
    np.testing.assert_allclose(have, want[place], rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(targets, want_targets[place], atol=1e-6)


def test_big_visions_form_rolls_by_one():
    """a = max(a, 1 - a), one a per step, partner = roll by 1 of the (group of) examples."""
    options = {"mixup_alpha": 0.2, "fold_lambda": True, "group_size": 8}
    mixing = make_mixing(**options)
    x = np.random.default_rng(0).normal(size=(8, *SIZE, 3)).astype(np.float32)
    rows = mixing.draw(0, seed=1, batch_size=8, size=SIZE)
    a = rows.numpy()[0, 0]
    assert 0.5 <= a < 1 and (rows == rows[0]).numpy().all()
    np.testing.assert_allclose(
        mixing.images(x, rows), a * x + (1 - a) * np.roll(x, 1, axis=0), atol=1e-6
    )
    many = draw(mode="elem", batch_size=4096, **options)
    assert many[:, 0].min() >= 0.5


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_lambda_is_beta(alpha):
    beta = scipy.stats.beta(alpha, alpha)
    share = draw(mode="elem", mixup_alpha=alpha, batch_size=4000)[:, 0].astype(np.float64)
    assert scipy.stats.kstest(share, beta.cdf).pvalue > 0.01

    # Of a side of relative length r, drawn with its centre inside, r - r^2 / 4 are expected inside.
    def area(share):
        side = np.sqrt(1 - share)
        return (side - side**2 / 4) ** 2

    mixing = make_mixing(mode="elem", cutmix_alpha=alpha)
    share = mixing.draw(0, seed=3, batch_size=4000, size=(10**4, 10**4)).numpy()[:, 0]
    assert 1 - share.mean() == pytest.approx(beta.expect(area), abs=0.02)


def test_shares_of_what_is_mixed():
    rows = draw(mode="elem", batch_size=8192, probability=0.7, switch_probability=0.25, **DEIT)
    mixed = (rows != np.array(IDENTITY, np.float32)).any(1)
    cut = mixed & (rows[:, 1] == 1)
    assert mixed.mean() == pytest.approx(0.7, abs=0.03)
    assert cut.sum() / mixed.sum() == pytest.approx(0.25, abs=0.03)
    assert (draw(mode="elem", cutmix_alpha=1.0)[:, 1] == 1).all()
    assert (draw(mode="elem", mixup_alpha=1.0)[:, 2:] == 0).all()
    assert (draw(mode="elem", probability=0.0, **DEIT) == np.array(IDENTITY, np.float32)).all()


@pytest.mark.parametrize(
    ("mode", "group", "distinct"),
    [("batch", 2, 1), ("pair", 2, 32), ("pair", 8, 8), ("elem", 2, 64)],
)
def test_who_shares_a_draw(mode, group, distinct):
    rows = draw(mode=mode, mixup_alpha=1.0, group_size=group)
    parts = rows.reshape(distinct, 64 // distinct, 6)
    assert (parts == parts[:, :1]).all()
    assert len(set(parts[:, 0, 0])) == distinct


def test_a_draw_is_a_function_of_seed_and_step():
    rows = [draw(*p, seed=s, mode="elem", **DEIT) for p, s in (((5,), 1), ((5,), 1))]
    np.testing.assert_array_equal(*rows)
    others = [draw(6, seed=1, mode="elem", **DEIT), draw(5, seed=2, mode="elem", **DEIT)]
    for other in others:
        assert (other != rows[0]).any(1).mean() > 0.9


@pytest.mark.parametrize("replicas,hosts,first", [(2, 1, 0), (2, 2, 0), (4, 2, 3), (1, 1, 3)])
def test_rows_of_the_pipeline_do_not_depend_on_the_machine(replicas, hosts, first):
    source, ops = open_source("demo", split="val"), pipe.parse("value_range|keep('image', 'label')")
    mixing = make_mixing(mode="elem", **DEIT)
    whole, local = [], replicas // hosts
    for host in range(hosts):
        ds = pipeline.make_train_data(
            source,
            ops,
            batch_size=16,
            seed=9,
            first_step=first,
            num_replicas=replicas,
            local_replicas=range(host * local, (host + 1) * local),
            mixing=mixing,
        )
        assert ds.element_spec["mix"] == tf.TensorSpec((16 // replicas, 6), tf.float32)
        rows = [x["mix"] for x in ds.take(2 * local).as_numpy_iterator()]
        whole.append(np.reshape(rows, (2, -1, 6)))
    for i, rows in enumerate(np.concatenate(whole, axis=1)):
        want = mixing.draw(first + i, seed=9, batch_size=16, size=(8, 8))
        np.testing.assert_array_equal(rows, want)


class ImageNet(Net):
    """Takes images, where `Net` takes their pixels in a row."""

    def call(self, x, training=False, seed=None):
        return super().call(tf.reshape(x, (-1, 12)))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"jit": "split"}, marks=pytest.mark.exhaustive),
        {"jit": "off", "replicas": 2},
        {"jit": "split", "accumulation": 2},
    ],
    ids=str,
)
def test_a_step_sees_the_mixed_batch(options):
    """As a step without mixing sees what NumPy mixed, on any replicas and micro-batches."""
    mixing = make_mixing(mode="elem", **DEIT)
    rows = np.stack([mixing.draw(i, seed=0, batch_size=BATCH, size=(2, 2)) for i in range(2)])
    images, labels = IMAGES[:2] % 250, LABELS[:2]
    common = {"loss": make_loss(label_smoothing=0.1), "optimizer": {"name": "sgd"}}

    def as_images(x):
        return tf.reshape(preprocess(x), (-1, 2, 2, 3))

    engine = Engine(make_image_net, preprocess=as_images, mixing=mixing, **common, **options)
    engine.more = {"mix": rows}
    have = engine.run(images, labels)
    values = np.stack([as_images(x) for x in images])
    partner = np.arange(BATCH) ^ 1
    y, x = np.indices((2, 2))
    box = [rows[..., i, None, None] for i in range(1, 6)]
    inside = (y >= box[1]) & (y < box[2]) & (x >= box[3]) & (x < box[4])
    weight = np.where(inside, 0, box[0])[..., None]
    mixed = weight * values + (1 - weight) * values[:, partner]
    targets = np.eye(CLASSES, dtype=np.float32)[labels]
    targets = rows[..., :1] * targets + (1 - rows[..., :1]) * targets[:, partner]
    plain = Engine(make_image_net, preprocess=lambda x: x, jit="off", **common)
    want = plain.run(mixed.astype(np.float32), targets.astype(np.float32))
    for a, b in zip(have, want, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name, array in engine.state.to_arrays().items():
        np.testing.assert_allclose(array, plain.state.to_arrays()[name], atol=1e-6, err_msg=name)


def make_image_net():
    model = ImageNet(name="net", dtype="float32")
    model.build()
    for variable, other in zip(model.weights, make_net().weights, strict=True):
        variable.assign(other.numpy())
    return model


def test_a_masked_partner_is_not_mixed_in():
    mixing = make_mixing(mode="elem", mixup_alpha=1.0)
    rows = mixing.draw(0, seed=0, batch_size=6, size=SIZE)
    spared = mixing.spare_masked(rows, tf.constant([1.0, 0, 1, 1, 0, 1]))
    identity = np.array(IDENTITY, np.float32)
    kept = [1, 2, 3, 4]  # 0 and 5 have masked partners; 1 and 4 are masked themselves
    np.testing.assert_array_equal(spared.numpy()[kept], rows.numpy()[kept])
    np.testing.assert_array_equal(spared.numpy()[[0, 5]], [identity, identity])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixup_alpha": -0.1}, ["mixing.mixup_alpha", "-0.1"]),
        ({"cutmix_alpha": float("nan")}, ["mixing.cutmix_alpha", "nan"]),
        ({"probability": 1.1}, ["mixing.probability", "[0, 1]", "1.1"]),
        ({"switch_probability": -1.0}, ["mixing.switch_probability", "-1.0"]),
        ({"mode": "element"}, ["mixing.mode", "'element'", "batch, pair, elem"]),
        ({"group_size": 1}, ["mixing.group_size", "2 or more", "1"]),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(ValueError) as error:
        check(make(**{f"mixing__{key}": value for key, value in options.items()}))
    for word in words:
        assert word in str(error.value)


def test_groups_must_not_be_cut():
    mixing = make_mixing(mixup_alpha=0.2, group_size=8)
    check_groups(mixing, batch_size=24, num_parts=3)
    check_groups(None, batch_size=24, num_parts=24)
    with pytest.raises(ValueError, match=r"group_size 8 does not divide the 12.*2 parts"):
        check_groups(mixing, batch_size=24, num_parts=2)
    config = make(mixing__mixup_alpha=0.2, input__batch_size=16, step__accumulation=16)
    with pytest.raises(ValueError, match="16 parts"):
        check(config)


def test_a_run_with_mixing_resumes_with_the_same_metrics(tmp_path):
    options = {"mixing__mixup_alpha": 0.8, "mixing__cutmix_alpha": 1.0}
    config = without_evaluation(total_steps=3, save_steps=2, **options)
    whole = train(config, str(tmp_path / "run"))
    # As if the run had been stopped after the second step.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000000003")
    parts = train(config, str(tmp_path / "run"))
    assert parts["loss"] == whole["loss"] and parts["accuracy"] == whole["accuracy"]
    # A head of zeros gives log 10 for any mixture of labels: the second step is the first to tell.
    plain = train(without_evaluation(total_steps=3), str(tmp_path / "plain"))
    assert plain["loss"] != whole["loss"]
