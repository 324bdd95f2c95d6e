"""One step means one thing on any number of replicas and micro-batches, and for each precision."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import log_softmax, softmax

from vit_dist.model.layers import Dropout
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.training import step as step_lib
from vit_dist.training.losses import make_loss
from vit_dist.training.optim import make_optimizer
from vit_dist.training.state import INITIAL_LOSS_SCALE, TrainState
from vit_dist.training.step import check_step, choose_jit, make_train_step

BATCH, STEPS, CLASSES = 16, 5, 5
SMOOTHING, CLIP, EMA, DECAY, EPSILON = 0.1, 0.05, 0.9, 0.2, 1e-3
NAN, LARGE = 255, 254  # pixels that become NaN, or 2000


def preprocess(images):
    x = tf.cast(images, tf.float32)
    x = tf.where(x == NAN, np.nan, tf.where(x == LARGE, 2000.0, x / 127.5 - 1))
    return tf.reshape(x, (-1, 12))


def schedule(step):
    return 0.1 / (1.0 + tf.cast(step, tf.float32))


class Net(keras.Model):
    """Two dense layers; logits in float32."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        options = {"activation": "relu", "name": "hidden", "dtype": self.dtype_policy}
        self.hidden = keras.layers.Dense(8, **options)
        self.head = keras.layers.Dense(CLASSES, name="head", dtype="float32")

    def build(self, input_shape=None):
        self.hidden.build((None, 12))
        self.head.build((None, 8))
        self.built = True

    def call(self, x, training=False, seed=None):
        return self.head(tf.cast(self.hidden(x), tf.float32))


def make_net(precision="float32"):
    model = Net(name="net", dtype=precision)
    model.build()
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(0.5 * rng.standard_normal(variable.shape))
    return model


@functools.cache
def make_strategy(replicas):
    if replicas == 1:
        return tf.distribute.OneDeviceStrategy("CPU:0")
    # As strategy.make_strategy has it.
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


class Engine:
    """A compiled step with its state, which each run sets back to the beginning."""

    def __init__(self, make_model, *, replicas=1, ema_decay=None, optimizer=None, **options):
        self.strategy = make_strategy(replicas)
        with self.strategy.scope():
            model = make_model()
            rule = make_optimizer(named_weights(model), **(optimizer or {}))
            ema = make_model() if ema_decay else None
            self.state = TrainState(model, rule, ema)
        self.step = make_train_step(
            self.state,
            options.pop("loss", make_loss()),
            strategy=self.strategy,
            schedule=options.pop("schedule", schedule),
            preprocess=options.pop("preprocess", preprocess),
            batch_size=BATCH,
            seed=options.pop("seed", 0),
            ema_decay=ema_decay,
            **options,
        )
        self.initial = self.state.to_arrays()

    def batches(self, images, labels):
        """Global batches (steps, BATCH, ...), each replica's share after the other."""
        parts = self.strategy.num_replicas_in_sync

        def cut(x):
            return np.reshape(x, (len(x) * parts, BATCH // parts, *x.shape[2:]))

        data = tf.data.Dataset.from_tensor_slices({"image": cut(images), "label": cut(labels)})
        return iter(self.strategy.distribute_datasets_from_function(lambda _: data))

    def run(self, images, labels, *, calls=None, **changed):
        """All steps, one a call unless `calls` says how many; returns each call's metrics."""
        arrays = {**self.initial, **{k: np.asarray(v) for k, v in changed.items()}}
        self.state.from_arrays(arrays)
        batches, out = self.batches(images, labels), []
        for n in calls or [1] * len(images):
            metrics = self.step(batches, tf.constant(n))
            out.append({name: float(value) for name, value in metrics.items()})
        return out

    def replicas_hold_the_same(self):
        for name, variable in self.state.variables().items():
            value = variable.value if isinstance(variable, keras.Variable) else variable
            first, *rest = self.strategy.experimental_local_results(value)
            for other in rest:
                np.testing.assert_array_equal(first.numpy(), other.numpy(), err_msg=name)


def weights_of(arrays):
    """What a step may change but for its counters."""
    return {name: value for name, value in arrays.items() if "/" in name}


def assert_bits(actual, expected):
    assert set(actual) == set(expected)
    for name, value in actual.items():
        assert value.tobytes() == expected[name].tobytes(), name


# Data: the first examples are brighter by far, so that their gradient is the larger one; the labels
# are sorted, so that no replica sees all classes.
def make_data():
    rng = np.random.default_rng(0)
    images = rng.integers(100, 150, (STEPS, BATCH, 2, 2, 3)).astype(np.uint8)
    images[:, :4] = rng.integers(0, 250, (STEPS, 4, 2, 2, 3))
    return images, np.sort(rng.integers(0, CLASSES, (STEPS, BATCH)), axis=1)


IMAGES, LABELS = make_data()
MATRIX = [
    (1, 1, "whole"),
    (1, 4, "whole"),
    (2, 1, "split"),
    (2, 2, "split"),
    (4, 2, "off"),  # XLA would take many times as long for four devices
]


@pytest.fixture(scope="module")
def engine():
    """engine(replicas, accumulation, jit) -> that Engine, compiled once for this module."""

    @functools.cache
    def get(replicas, accumulation, jit):
        return Engine(
            make_net,
            replicas=replicas,
            accumulation=accumulation,
            jit=jit,
            loss=make_loss(label_smoothing=SMOOTHING),
            optimizer={"weight_decay": DECAY, "epsilon": EPSILON},
            clip_norm=CLIP,
            ema_decay=EMA,
        )

    return get


# The same in NumPy


def loss_and_gradient(w, images, labels):
    """Summed over the examples."""
    x = images.reshape(len(images), 12) / 127.5 - 1
    h = np.maximum(x @ w["hidden/kernel"] + w["hidden/bias"], 0)
    logits = h @ w["head/kernel"] + w["head/bias"]
    targets = np.eye(CLASSES)[labels] * (1 - SMOOTHING) + SMOOTHING / CLASSES
    d_logits = softmax(logits, -1) - targets
    d_h = d_logits @ w["head/kernel"].T * (h > 0)
    gradient = {
        "hidden/kernel": x.T @ d_h,
        "hidden/bias": d_h.sum(0),
        "head/kernel": h.T @ d_logits,
        "head/bias": d_logits.sum(0),
    }
    hits = (logits.argmax(-1) == labels).sum()
    return -(targets * log_softmax(logits, -1)).sum(), hits, gradient


def clipped(gradient, limit):
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    return norm, {k: g * min(1, limit / norm) for k, g in gradient.items()}


def restated(initial, *, clip_parts=False):
    """(metrics per step, arrays at the end); `clip_parts` clips each half of the batch alone."""
    w = {k[6:]: v.astype(np.float64) for k, v in initial.items() if k.startswith("model/")}
    m, v = ({k: 0 * x for k, x in w.items()} for _ in range(2))
    ema, history = dict(w), []
    for step, (images, labels) in enumerate(zip(IMAGES, LABELS, strict=True)):
        loss, hits, gradient = loss_and_gradient(w, images, labels)
        gradient = {k: g / BATCH for k, g in gradient.items()}
        norm, gradient = clipped(gradient, CLIP)
        if clip_parts:
            halves = [
                loss_and_gradient(w, images[half], labels[half])[2]
                for half in (slice(BATCH // 2), slice(BATCH // 2, None))
            ]
            halves = [clipped({k: g / BATCH for k, g in h.items()}, CLIP)[1] for h in halves]
            gradient = {k: halves[0][k] + halves[1][k] for k in gradient}
        rate = 0.1 / (1 + step)
        for k, g in gradient.items():
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.999 * v[k] + 0.001 * g**2
            correction = np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
            decayed = w[k] * (1 - rate * DECAY * k.endswith("kernel"))
            w[k] = decayed - rate * correction * m[k] / (np.sqrt(v[k]) + EPSILON)
            ema[k] = EMA * ema[k] + (1 - EMA) * w[k]
        values = {"loss": loss / BATCH, "accuracy": hits / BATCH, "grad_norm": norm}
        history.append({**values, "learning_rate": rate})
    arrays = {f"model/{k}": x for k, x in w.items()} | {f"ema/{k}": x for k, x in ema.items()}
    arrays |= {f"optimizer/{k}/momentum": x for k, x in m.items()}
    return history, arrays | {f"optimizer/{k}/velocity": x for k, x in v.items()}


@pytest.mark.parametrize(("replicas", "accumulation", "jit"), MATRIX)
def test_a_step_means_the_same_everywhere(engine, replicas, accumulation, jit):
    engine = engine(replicas, accumulation, jit)
    metrics = engine.run(IMAGES, LABELS)
    history, expected = restated(engine.initial)
    for got, want in zip(metrics, history, strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
    final = engine.state.to_arrays()
    assert set(expected) == set(weights_of(final))
    for name, value in expected.items():
        np.testing.assert_allclose(final[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert (final["step"], final["updates"], final["first_bad_step"]) == (5, 5, -1)
    engine.replicas_hold_the_same()


def test_the_data_can_tell_global_from_local_clipping():
    initial = {f"model/{k}": v.numpy() for k, v in named_weights(make_net()).items()}
    history, right = restated(initial)
    assert all(h["grad_norm"] > 2 * CLIP for h in history)
    _, wrong = restated(initial, clip_parts=True)
    assert max(np.abs(right[k] - wrong[k]).max() for k in right if k.startswith("model/")) > 1e-2


@pytest.mark.parametrize(("replicas", "accumulation", "jit"), [MATRIX[0], MATRIX[3]])
def test_steps_in_one_call_equal_calls_of_one_step(engine, replicas, accumulation, jit):
    engine = engine(replicas, accumulation, jit)
    singles = engine.run(IMAGES, LABELS)
    expected = engine.state.to_arrays()
    first, rest = engine.run(IMAGES, LABELS, calls=[1, 4])
    assert_bits(engine.state.to_arrays(), expected)
    assert first == singles[0]
    for name in ("loss", "accuracy"):
        mean = np.mean([m[name] for m in singles[1:]])
        assert rest[name] == pytest.approx(mean, rel=1e-6)
    for name in ("grad_norm", "learning_rate"):
        assert rest[name] == singles[-1][name]


def test_no_clipping_no_average_and_no_momentum():
    engine = Engine(
        make_net,
        replicas=2,
        jit="off",
        clip_norm=None,
        optimizer={"name": "sgd", "momentum": 0.0},
        loss=make_loss(label_smoothing=SMOOTHING),
    )
    assert engine.state.ema is None and engine.state.eval_model is engine.state.model
    (metrics,) = engine.run(IMAGES[:1], LABELS[:1])
    w = {k[6:]: v for k, v in engine.initial.items() if k.startswith("model/")}
    _, _, gradient = loss_and_gradient(w, IMAGES[0], LABELS[0])
    assert metrics["grad_norm"] == pytest.approx(clipped(gradient, 1)[0] / BATCH, rel=1e-5)
    for name, value in named_weights(engine.state.model).items():
        expected = w[name] - 0.1 * gradient[name] / BATCH
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-6)


# What is not finite


@pytest.mark.parametrize(("replicas", "accumulation", "jit"), [MATRIX[0], MATRIX[2], MATRIX[4]])
@pytest.mark.parametrize("pixel", [0, -1], ids=["first example", "last example"])
def test_a_nan_on_one_replica_stops_all(engine, pixel, replicas, accumulation, jit):
    engine = engine(replicas, accumulation, jit)
    engine.run(IMAGES[:2], LABELS[:2])
    expected = engine.state.to_arrays()
    images = IMAGES.copy()
    images[2, pixel, 0, 0, 0] = NAN
    metrics = engine.run(images, LABELS)
    final = engine.state.to_arrays()
    assert_bits(weights_of(final), weights_of(expected))
    assert (final["first_bad_step"], final["step"], final["updates"]) == (2, STEPS, 2)
    engine.replicas_hold_the_same()
    assert [np.isfinite(m["grad_norm"]) for m in metrics] == [True, True, False, True, True]


def test_the_first_bad_step_stays_the_first(engine):
    engine = engine(*MATRIX[0])
    images = IMAGES.copy()
    images[[0, 3], 0] = NAN
    engine.run(images, LABELS)
    final = engine.state.to_arrays()
    assert (final["first_bad_step"], final["updates"]) == (0, 0)
    assert_bits(weights_of(final), weights_of(engine.initial))


@pytest.fixture(scope="module")
def half():
    """float16 on two replicas; the loss scale doubles after 3 good steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_lib, "GROWTH_STEPS", 3)
        engine = Engine(
            functools.partial(make_net, "mixed_float16"),
            replicas=2,
            jit="split",
            loss=make_loss(label_smoothing=SMOOTHING),
            optimizer={"weight_decay": DECAY, "epsilon": EPSILON},
            clip_norm=CLIP,
            ema_decay=EMA,
        )
        engine.run(IMAGES[:1], LABELS[:1])  # traced here
        yield engine


def test_float16_trains_like_float32(half):
    metrics = half.run(IMAGES, LABELS)
    history, expected = restated(half.initial)
    for got, want in zip(metrics, history, strict=True):
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.01)
        assert got["loss"] == pytest.approx(want["loss"], rel=0.01)
    final = half.state.to_arrays()
    for name in expected:
        if name.startswith(("model/", "ema/")):
            np.testing.assert_allclose(final[name], expected[name], atol=0.01, err_msg=name)


def test_float16_scale_doubles_after_good_steps(half):
    scales = []
    for steps in range(1, STEPS + 1):
        half.run(IMAGES[:steps], LABELS[:steps], loss_scale=np.float32(64), good_steps=1)
        scales.append((half.state.loss_scale.numpy(), half.state.good_steps.numpy()))
    assert scales == [(64, 2), (128, 0), (128, 1), (128, 2), (256, 0)]


def test_float16_overflow_on_one_replica_skips_on_all(half):
    assert half.initial["loss_scale"] == INITIAL_LOSS_SCALE
    images = IMAGES.copy()
    images[2, -1] = LARGE  # of replica 1; its gradient overflows at this scale and not at 1
    half.run(images[:2], LABELS[:2])
    expected = half.state.to_arrays()
    bad, *good = half.run(images[2:], LABELS[2:], **expected)
    final = half.state.to_arrays()
    assert not np.isfinite(bad["grad_norm"]) and np.isfinite(bad["loss"])
    assert all(np.isfinite(m["grad_norm"]) for m in good)
    assert (final["step"], final["updates"], final["first_bad_step"]) == (5, 4, -1)
    assert (final["loss_scale"], final["good_steps"]) == (INITIAL_LOSS_SCALE / 2, 2)
    half.replicas_hold_the_same()
    # The step that overflowed changed nothing: one call for it alone.
    half.run(images[2:3], LABELS[2:3], **expected)
    assert_bits(weights_of(half.state.to_arrays()), weights_of(expected))
    # The same batch is fine at a scale that fits it.
    half.run(images[2:3], LABELS[2:3], **{**expected, "loss_scale": np.float32(1)})
    assert half.state.updates.numpy() == 3


def test_float16_is_bad_only_when_the_scale_cannot_fall(half):
    images = IMAGES.copy()
    images[:, 0] = NAN
    half.run(images, LABELS, loss_scale=np.float32(8))
    final = half.state.to_arrays()
    assert (final["first_bad_step"], final["loss_scale"], final["updates"]) == (3, 1, 0)


# Masks


class Probe(keras.Model):
    """Weights that show the mask of each example: a row for each, which begins at zero."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drop = Dropout(0.5, name="drop")

    def build(self, input_shape=None):
        self.rows = self.add_weight(name="rows", shape=(BATCH, 32), initializer="zeros")
        self.drop.build((None, 32))
        self.built = True

    def call(self, x, training=False, seed=None):
        return self.drop(tf.matmul(x, self.rows), training=training, seed=seed)


def make_probe():
    model = Probe(name="probe")
    model.build()
    return model


@pytest.fixture(scope="module", params=["split", "off"])
def masks(request):
    """masks(steps): one (BATCH, 32) mask for each step, over 2 replicas x 2 micro-batches."""

    def make(seed):
        return Engine(
            make_probe,
            replicas=2,
            accumulation=2,
            jit=request.param,
            seed=seed,
            clip_norm=None,
            optimizer={"name": "sgd", "momentum": 0.0},
            schedule=lambda step: 1.0,
            preprocess=lambda x: x,
        )

    engines = functools.cache(make)

    def get(steps, seed=0):
        engine, out = engines(seed), []
        for step in steps:
            images = np.eye(BATCH, dtype=np.float32)[None]
            engine.run(images, np.zeros((1, BATCH), np.int32), step=np.int64(step))
            out.append(engine.state.to_arrays()["model/rows"] != 0)
        return np.array(out)

    return get


def test_masks_differ_everywhere_and_repeat(masks):
    drawn = masks([0, 1, 10**9])
    parts = drawn.reshape(3 * 4, BATCH // 4, 32)  # step, replica and micro-batch
    for i, one in enumerate(parts):
        assert abs(one.mean() - 0.5) < 4 * 0.5 / np.sqrt(one.size)
        for other in parts[:i]:
            assert 0.25 < np.mean(one == other) < 0.75
    np.testing.assert_array_equal(masks([10**9, 1, 0])[::-1], drawn)


def test_masks_depend_on_the_seed(masks):
    first, other = masks([0]), masks([0], seed=1)
    assert 0.4 < np.mean(first == other) < 0.6


# The real network


def test_a_vit_trains_the_same_with_xla_and_without():
    # No masks: the same seed draws other numbers in XLA.
    config = vit_config(
        "mu/4", image_size=8, num_classes=CLASSES, width=16, mlp_dim=32, layer_scale=0.5
    )
    images = np.random.default_rng(0).integers(0, 256, (2, BATCH, 8, 8, 3)).astype(np.uint8)
    results = []
    for jit in ("whole", "off"):
        engine = Engine(
            functools.partial(build_vit, config),
            jit=jit,
            preprocess=lambda x: tf.cast(x, tf.float32) / 127.5 - 1,
            optimizer={"epsilon": EPSILON},
        )
        metrics = engine.run(images, LABELS[:2])
        results.append((metrics, engine.state.to_arrays(), engine.initial))
    (metrics, final, initial), (other_metrics, other, _) = results
    for got, want in zip(metrics, other_metrics, strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    for name in final:
        np.testing.assert_allclose(final[name], other[name], rtol=1e-3, atol=1e-5, err_msg=name)
        if name.startswith("model/"):
            assert np.any(final[name] != initial[name]), name


# The shape of the program


def count_ops(accumulation):
    """How often each op occurs in the traced step, its functions included; nothing runs."""
    engine = Engine(make_net, accumulation=accumulation, jit="off")
    batches = engine.batches(IMAGES, LABELS)
    graph = engine.step.get_concrete_function(batches, tf.constant(1)).graph.as_graph_def()
    ops = [n.op for n in graph.node]
    for function in graph.library.function:
        ops += [n.op for n in function.node_def]
    return {op: ops.count(op) for op in set(ops)}


def test_accumulation_is_one_loop():
    plain, two, eight = (count_ops(a) for a in (1, 2, 8))
    assert two == eight

    def loops(counts):
        return sum(counts.get(op, 0) for op in ("While", "StatelessWhile"))

    assert loops(two) == loops(plain) + 1


# Arguments


@pytest.mark.parametrize(
    ("jit", "kind", "replicas", "expected"),
    [
        ("auto", "CPU", 1, "whole"),
        ("auto", "CPU", 2, "split"),
        ("auto", "GPU", 1, "whole"),
        ("auto", "GPU", 8, "whole"),
        ("auto", "TPU", 8, "off"),
        ("whole", "TPU", 8, "off"),  # TPUStrategy compiles it
        ("off", "GPU", 8, "off"),
        ("split", "GPU", 8, "split"),
        ("whole", "CPU", 1, "whole"),
    ],
)
def test_where_xla_compiles(jit, kind, replicas, expected):
    assert choose_jit(jit, kind=kind, num_replicas=replicas) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation": 0}, "step.accumulation must be 1 or more, got 0"),
        ({"num_replicas": 3}, "16 is not divisible by 3 replicas x 1 .* nearest that is: 15"),
        (
            {"num_replicas": 4, "accumulation": 8},
            "16 is not divisible by 4 replicas x 8 micro-batches; the nearest that is: 32",
        ),
        ({"batch_size": 0}, "input.batch_size 0"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, or None for no clipping, got 0.0"),
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1, or None, got 1.0"),
        ({"ema_decay": 0.0}, "ema_decay must be"),
        ({"jit": "yes"}, "step.jit 'yes' is unknown; allowed: auto, whole, split, off"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        check_step(**{"batch_size": BATCH, "num_replicas": 2, **options})
