"""One step means one thing on any number of replicas and micro-batches."""

import functools
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from tests.support.stepping import (
    BATCH,
    CLASSES,
    CLIP,
    EPSILON,
    IMAGES,
    LABELS,
    NAN,
    OPTIONS,
    STEPS,
    Engine,
    assert_bits,
    clipped,
    loss_and_gradient,
    make_net,
    restated,
    weights_of,
)
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.training.step import StepOptions, check_batch, choose_jit, choose_pack_bytes

# Replicas, micro-batches, and what XLA compiles; the step of each is made once for this module.
ONE, TWO, FOUR = MATRIX = [
    (1, 1, "whole"),
    (2, 2, "split"),
    (4, 2, "off"),  # XLA would take many times as long for four devices
]
FURTHER = [
    pytest.param(*of, marks=pytest.mark.exhaustive) for of in ((1, 4, "whole"), (2, 1, "split"))
]


@pytest.fixture(scope="module")
def engine():
    """engine(replicas, accumulation, jit) -> that Engine, compiled once for this module."""

    @functools.cache
    def get(replicas, accumulation, jit):
        return Engine(make_net, replicas=replicas, accumulation=accumulation, jit=jit, **OPTIONS)

    return get


@pytest.mark.parametrize(("replicas", "accumulation", "jit"), MATRIX + FURTHER)
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


@pytest.mark.parametrize(("replicas", "accumulation", "jit"), [ONE, TWO])
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
        loss=OPTIONS["loss"],
    )
    assert engine.state.ema is None and engine.state.eval_model is engine.state.model
    (metrics,) = engine.run(IMAGES[:1], LABELS[:1])
    w = {k[6:]: v for k, v in engine.initial.items() if k.startswith("model/")}
    _, _, gradient = loss_and_gradient(w, IMAGES[0], LABELS[0])
    assert metrics["grad_norm"] == pytest.approx(clipped(gradient, 1)[0] / BATCH, rel=1e-5)
    for name, value in named_weights(engine.state.model).items():
        expected = w[name] - 0.1 * gradient[name] / BATCH
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_that_travel_in_bfloat16():
    """The same step to the rounding of 8 bits; one replica sends nothing."""
    results = {}
    for replicas in (1, 2):
        engine = Engine(
            make_net, replicas=replicas, jit="off", all_reduce_dtype="bfloat16", **OPTIONS
        )
        metrics = engine.run(IMAGES, LABELS)
        results[replicas] = metrics, engine.state.to_arrays()
        engine.replicas_hold_the_same()
    history, expected = restated(engine.initial)
    norms = [h["grad_norm"] for h in history]
    exact, rounded = ([m["grad_norm"] for m in results[r][0]] for r in (1, 2))
    np.testing.assert_allclose(exact, norms, rtol=1e-5)
    np.testing.assert_allclose(rounded, norms, rtol=2**-7)
    assert np.any(np.abs(np.array(rounded) / norms - 1) > 2**-14)
    for name, value in expected.items():
        limit = 0.01 if name.startswith(("model/", "ema/")) else 2**-6 * np.abs(value).max()
        np.testing.assert_allclose(results[2][1][name], value, rtol=0, atol=limit, err_msg=name)


# What is not finite


@pytest.mark.parametrize(("replicas", "accumulation", "jit"), MATRIX)
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
    engine = engine(*ONE)
    images = IMAGES.copy()
    images[[0, 3], 0] = NAN
    engine.run(images, LABELS)
    final = engine.state.to_arrays()
    assert (final["first_bad_step"], final["updates"]) == (0, 0)
    assert_bits(weights_of(final), weights_of(engine.initial))


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
        ("auto", "GPU", 8, "split"),
        ("whole", "GPU", 8, "whole"),
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
    "hosts, replicas, kind, several",
    [
        (2, 2, "CPU", True),
        # The order of a ring's additions would change.
        (3, 3, "CPU", False),
        (2, 4, "CPU", False),
        (2, 2, "GPU", False),
        # Virtual CPUs and GPUs of one process.
        (1, 2, "CPU", False),
        (1, 1, "CPU", False),
    ],
)
def test_gradients_travel_in_packs_where_that_changes_no_bit(hosts, replicas, kind, several):
    multi = tf.distribute.MultiWorkerMirroredStrategy
    strategy = mock.Mock(spec=multi if hosts > 1 else tf.distribute.MirroredStrategy)
    strategy.num_replicas_in_sync = replicas
    addresses = [f"host{i}:2222" for i in range(hosts)]
    strategy.cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": addresses}), task_type="worker", task_id=0
    )
    strategy.extended.worker_devices = (f"/job:worker/task:0/device:{kind}:0",)
    assert (choose_pack_bytes(strategy) > 0) == several


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
        ({"all_reduce_dtype": "float16"}, "step.all_reduce_dtype 'float16' is unknown; allowed"),
        ({"jit": "yes"}, "step.jit 'yes' is unknown; allowed: auto, whole, split, off"),
    ],
)
def test_mistakes(options, message):
    options = dict(options)
    with pytest.raises(ValueError, match=message):
        batch_size, num_replicas = options.pop("batch_size", BATCH), options.pop("num_replicas", 2)
        check_batch(batch_size, StepOptions(**options), num_replicas=num_replicas)


@pytest.mark.parametrize("of", [ONE, TWO])
def test_the_wait_for_batches_is_known(engine, of, monkeypatch):
    engine = engine(*of)
    engine.run(IMAGES, LABELS)
    at_hand = sum(engine.waited)
    monkeypatch.setattr(engine, "delay", 0.3)
    engine.run(IMAGES, LABELS, calls=[STEPS])
    # Some are made ahead, but for no later step than the next two.
    assert engine.waited[0] >= (STEPS - 3) * 0.3 > 0
    assert engine.waited[0] > at_hand


@pytest.mark.parametrize("shard_state", [False, True])
def test_an_average_that_warms_up(shard_state):
    """timm's: after t updates the decay is min(d, 1 - (1 + t)^(-2/3)), so the first is 0."""
    decay, steps = 0.5, 4
    engine = Engine(
        make_net,
        replicas=2,
        jit="off",
        ema_decay=decay,
        ema_warmup=True,
        optimizer={"name": "sgd", "shard_state": shard_state},
        loss=OPTIONS["loss"],
    )
    average = None
    for step in range(steps):
        engine.run(IMAGES[: step + 1], LABELS[: step + 1])
        final = engine.state.to_arrays()
        weights = {k[6:]: v for k, v in final.items() if k.startswith("model/")}
        d = min(decay, 1 - (1 + step) ** (-2 / 3))
        average = average or weights
        average = {k: d * average[k] + (1 - d) * w for k, w in weights.items()}
        for name, value in average.items():
            # A few roundings of each weight and step; weights and their averages are below 2.
            atol = 2 * 4 * steps * np.finfo(np.float32).eps
            np.testing.assert_allclose(final[f"ema/{name}"], value, rtol=0, atol=atol)
