"""A compiled step around a small network, and the same step in NumPy."""

import contextlib
import dataclasses
import functools

import keras
import numpy as np
import tensorflow as tf
from scipy.special import log_softmax, softmax

from tests.support.waiting import pause
from vit_dist.model.vit import named_weights
from vit_dist.training.losses import make_loss
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
from vit_dist.training.state import TrainState
from vit_dist.training.step import StepOptions, make_train_step

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


STEP_KEYS = {field.name for field in dataclasses.fields(StepOptions)}


class Engine:
    """A compiled step with its state, which each run sets back to the beginning."""

    def __init__(
        self, make_model, *, replicas=1, strategy=None, ema_decay=None, optimizer=None, **options
    ):
        self.strategy = strategy or make_strategy(replicas)
        chosen = OptimizerOptions(**(optimizer or {}))
        with self.strategy.scope():
            model = make_model()
            ema = make_model() if ema_decay else None
        with contextlib.nullcontext() if chosen.shard_state else self.strategy.scope():
            rule = make_optimizer(named_weights(model), chosen, strategy=self.strategy)
        with self.strategy.scope():
            self.state = TrainState(model, rule, ema)
        step = {k: options.pop(k) for k in list(options) if k in STEP_KEYS}
        self.step = make_train_step(
            self.state,
            options.pop("loss", make_loss()),
            strategy=self.strategy,
            schedule=options.pop("schedule", schedule),
            preprocess=options.pop("preprocess", preprocess),
            batch_size=BATCH,
            seed=options.pop("seed", 0),
            options=StepOptions(ema_decay=ema_decay, **step),
            **options,
        )
        self.initial = self.state.to_arrays()
        self.more = {}  # further entries of the batches, such as "mask"
        self.delay = 0.0  # seconds that each share of a batch takes to make

    def batches(self, images, labels):
        """Global batches (steps, BATCH, ...), each replica's share after the other."""
        parts = self.strategy.num_replicas_in_sync

        def cut(x):
            return np.reshape(x, (len(x) * parts, BATCH // parts, *x.shape[2:]))

        entries = {"image": images, "label": labels, **self.more}
        data = tf.data.Dataset.from_tensor_slices({k: cut(x) for k, x in entries.items()})
        if self.delay:
            data = data.map(
                lambda x: {**x, "label": tf.py_function(self._late, [x["label"]], x["label"].dtype)}
            )
            data = data.map(
                lambda x: {**x, "label": tf.ensure_shape(x["label"], x["image"].shape[:1])}
            )
        return iter(self.strategy.distribute_datasets_from_function(lambda _: data))

    def _late(self, labels):
        pause(self.delay)
        return labels

    def run(self, images, labels, *, calls=None, **changed):
        """All steps, one a call unless `calls` says how many; returns each call's metrics."""
        arrays = {**self.initial, **{k: np.asarray(v) for k, v in changed.items()}}
        self.state.from_arrays(arrays)
        batches, out, self.waited = self.batches(images, labels), [], []
        for n in calls or [1] * len(images):
            metrics = self.step(batches, tf.constant(n))
            self.waited.append(float(metrics.pop("input_wait")))  # no two are equal
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
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        assert actual[name].tobytes() == value.tobytes(), name


# Data: the first examples are brighter by far, so that their gradient is the larger one; the labels
# are sorted, so that no replica sees all classes.
def make_data():
    rng = np.random.default_rng(0)
    images = rng.integers(100, 150, (STEPS, BATCH, 2, 2, 3)).astype(np.uint8)
    images[:, :4] = rng.integers(0, 250, (STEPS, 4, 2, 2, 3))
    return images, np.sort(rng.integers(0, CLASSES, (STEPS, BATCH)), axis=1)


IMAGES, LABELS = make_data()
# What every engine is compared with.
OPTIONS = {
    "loss": make_loss(label_smoothing=SMOOTHING),
    "optimizer": {"weight_decay": DECAY, "epsilon": EPSILON},
    "clip_norm": CLIP,
    "ema_decay": EMA,
}


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
            m_hat, v_hat = m[k] / (1 - 0.9 ** (step + 1)), v[k] / (1 - 0.999 ** (step + 1))
            decayed = w[k] * (1 - rate * DECAY * k.endswith("kernel"))
            w[k] = decayed - rate * m_hat / (np.sqrt(v_hat) + EPSILON)
            ema[k] = EMA * ema[k] + (1 - EMA) * w[k]
        values = {"loss": loss / BATCH, "accuracy": hits / BATCH, "grad_norm": norm}
        history.append({**values, "learning_rate": rate})
    arrays = {f"model/{k}": x for k, x in w.items()} | {f"ema/{k}": x for k, x in ema.items()}
    arrays |= {f"optimizer/{k}/momentum": x for k, x in m.items()}
    return history, arrays | {f"optimizer/{k}/velocity": x for k, x in v.items()}


def options_of(name, momentum_dtype="float32"):
    # An epsilon that a difference in rounding cannot pass for a gradient.
    chosen = {"name": name, "weight_decay": 0.2, "momentum_dtype": momentum_dtype}
    if name in ("adamw", "lamb", "muon"):
        chosen["epsilon"] = 1e-3
    return {**OPTIONS, "optimizer": chosen, "jit": "off"}
