"""Law 1: (seed, step) decides the batch, whatever the threads, hosts, replicas and starts."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from tests.support import processes
from vit_dist.data import order, pipeline
from vit_dist.data.damage import explain_data_error
from vit_dist.data.ops import basic as ops
from vit_dist.data.sources.open import open_source

PIPE = "decode|random_shift(2)|flip_lr|value_range(-1, 1)|keep('image', 'label', 'index', 'epoch')"
BATCH = 24


@pytest.fixture(scope="module")
def demo():
    return open_source("demo", split="val")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 JPEGs of different sizes in two classes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for i in range(30):
        path = root / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.randint(0, 256, (16 + i, 40 - i, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return open_source("folder", split="train", data_dir=str(root))


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """20 PNGs in a TFRecord."""
    data_dir = str(tmp_path_factory.mktemp("stream"))
    tfds.testing.DummyMnist(data_dir=data_dir).download_and_prepare()
    return open_source("tfds", split="train", name="dummy_mnist", data_dir=data_dir)


PIPES = {
    "demo": PIPE,
    "folder": "decode_jpeg_and_inception_crop(8)|flip_lr|keep('image', 'label', 'index', 'epoch')",
    "stream": "decode|random_crop(8)|flip_lr|keep('image', 'label', 'index', 'epoch')",
}


@pytest.fixture(scope="module", params=list(PIPES))
def source_and_pipe(request):
    return request.getfixturevalue(request.param), ops.parse(PIPES[request.param])


@pytest.fixture(scope="module")
def reference(source_and_pipe):
    """The first global batches of one host with one replica: all of three epochs but the rest."""
    source, _ = source_and_pipe
    return steps(*source_and_pipe, 3 * source.num_examples // BATCH)


def take(ds, count):
    return list(ds.take(count).as_numpy_iterator())


def steps(source, pipe, count, *, first_step=0, replicas=1, hosts=1, threads=2, seed=7):
    """`count` global batches, put together from the elements of all hosts."""
    local = replicas // hosts
    parts = []
    for host in range(hosts):
        ds = pipeline.make_train_data(
            source,
            pipe,
            batch_size=BATCH,
            seed=seed,
            first_step=first_step,
            num_replicas=replicas,
            local_replicas=range(host * local, (host + 1) * local),
            num_threads=threads,
        )
        elements = take(ds, count * local)
        assert all(len(x["index"]) == BATCH // replicas for x in elements)
        parts.append([elements[i * local : (i + 1) * local] for i in range(count)])
    whole = [[x for part in parts for x in part[i]] for i in range(count)]
    return [{k: np.concatenate([x[k] for x in row]) for k in row[0]} for row in whole]


def assert_same(have, want):
    assert len(have) == len(want)
    for a, b in zip(have, want, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 4, "replicas": 2, "hosts": 2},
        pytest.param({"threads": 1}, marks=pytest.mark.exhaustive),
        pytest.param({"threads": 4}, marks=pytest.mark.exhaustive),
        pytest.param({"replicas": 2}, marks=pytest.mark.exhaustive),
        pytest.param({"replicas": 2, "hosts": 2}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_batches_do_not_depend_on_the_machine(source_and_pipe, reference, change):
    assert_same(steps(*source_and_pipe, 2, **change), reference[:2])


def test_a_later_start_continues(source_and_pipe, reference):
    first = len(reference) - 1
    have = steps(*source_and_pipe, 1, first_step=first, replicas=2, threads=1)
    assert_same(have, reference[first:])


def test_a_start_far_ahead_is_as_defined_by_position(demo):
    step = 10**6
    (batch,) = steps(demo, ops.parse(PIPE), 1, first_step=step)
    positions = step * BATCH + np.arange(BATCH)
    np.testing.assert_array_equal(batch["epoch"], positions // demo.num_examples)
    positions = tf.constant(positions, tf.int64)
    _, index = order.make_order(positions, num_examples=demo.num_examples, seed=7)
    np.testing.assert_array_equal(batch["index"], index)
    np.testing.assert_array_equal(batch["label"], demo.labels[index])
    known = {"batch_size": BATCH, "seed": 7, "first_step": step, "num_steps": 1}
    indices = pipeline.train_indices(demo, **known)
    np.testing.assert_array_equal(batch["index"], indices)


def test_images_are_those_of_their_index_with_their_seed(demo):
    pipe = ops.parse(PIPE)
    (batch,) = steps(demo, pipe, 1, first_step=33)
    words = tf.constant([7, 0], tf.int32)
    for image, index, epoch in zip(batch["image"], batch["index"], batch["epoch"], strict=True):
        seed = tf.random.fold_in(tf.random.fold_in(words, int(epoch)), int(index))
        example = {**demo.read(tf.constant(index)), "seed": seed, "index": index, "epoch": epoch}
        np.testing.assert_array_equal(image, pipe.host(example)["image"])


def test_each_epoch_holds_each_example_once(source_and_pipe, reference):
    source, _ = source_and_pipe
    index = np.concatenate([x["index"] for x in reference])
    epoch = np.concatenate([x["epoch"] for x in reference])
    orders = []
    for e in range(2):
        orders.append(tuple(index[epoch == e]))
        assert sorted(orders[-1]) == list(range(source.num_examples))
    assert orders[0] != orders[1] and orders[0] != tuple(range(source.num_examples))


def test_another_seed_is_another_order_and_augmentation(demo):
    (a,), (b,) = (steps(demo, ops.parse(PIPE), 1, seed=seed) for seed in (1, 2**40 + 1))
    assert (a["index"] != b["index"]).any()


@pytest.mark.parametrize("num_examples", [1, 2, 3, 1000])
def test_order_is_a_permutation_for_any_size(num_examples):
    positions = tf.range(3 * num_examples, dtype=tf.int64)
    epoch, index = order.make_order(positions, num_examples=num_examples, seed=3)
    assert epoch.numpy().tolist() == np.repeat(range(3), num_examples).tolist()
    rows = index.numpy().reshape(3, -1)
    assert (np.sort(rows) == np.arange(num_examples)).all()


def test_orders_are_as_good_as_random(num_examples=60_000, num_epochs=8):
    """Against tf.random.experimental.index_shuffle, whose epochs correlate by 0.9 here."""
    positions = tf.range(num_epochs * num_examples, dtype=tf.int64)
    _, index = order.make_order(positions, num_examples=num_examples, seed=1)
    rows = index.numpy().reshape(num_epochs, num_examples)
    correlation = np.corrcoef(np.vstack([np.arange(num_examples), rows]))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / np.sqrt(num_examples)  # five standard deviations
    assert max((a == b).sum() for a, b in itertools.pairwise(rows)) < 10  # expected: 1
    assert (np.abs(np.diff(rows)) == 1).sum(axis=1).max() < 12  # expected: 2


def test_a_batch_larger_than_the_source_spans_epochs(folder):
    pipe = ops.parse("decode|resize(8)|keep('image', 'index', 'epoch')")
    ds = pipeline.make_train_data(folder, pipe, batch_size=100, seed=0)
    (batch,) = take(ds, 1)
    assert np.bincount(batch["epoch"]).tolist() == [30, 30, 30, 10]
    assert len(set(batch["index"][30:60])) == 30


def test_shapes_are_static_and_images_uint8(source_and_pipe):
    source, pipe = source_and_pipe
    ds = pipeline.make_train_data(source, pipe, batch_size=24, seed=0, num_replicas=3)
    spec = ds.element_spec
    assert all(value.shape.is_fully_defined() and value.shape[0] == 8 for value in spec.values())
    assert spec["image"] == tf.TensorSpec((8, 8, 8, 3), tf.uint8)
    assert set(spec) == {"image", "label", "index", "epoch"}


@pytest.mark.parametrize(
    "replicas,hosts", [(2, 2), (3, 1), pytest.param(1, 1, marks=pytest.mark.exhaustive)]
)
def test_evaluation_holds_each_example_once(source_and_pipe, replicas, hosts):
    source, pipe = source_and_pipe
    local = replicas // hosts
    seen, counts = [], []
    for host in range(hosts):
        ds = pipeline.make_eval_data(
            source,
            pipe,
            batch_size=BATCH,
            num_replicas=replicas,
            local_replicas=range(host * local, (host + 1) * local),
        )
        spec = ds.element_spec
        assert spec["mask"] == tf.TensorSpec((BATCH // replicas,), tf.float32)
        elements = list(ds.as_numpy_iterator())
        counts.append(len(elements))
        seen += [i for x in elements for i in x["index"][x["mask"] == 1]]
    assert sorted(seen) == list(range(source.num_examples))
    assert counts == [-(-source.num_examples // BATCH) * local] * hosts
    if hosts == 1:
        assert seen == list(range(source.num_examples))


def test_evaluation_default_entries(demo):
    ds = pipeline.make_eval_data(demo, ops.parse("decode"), batch_size=7)
    batches = list(ds.as_numpy_iterator())
    assert set(batches[0]) == {"image", "label", "mask"}
    images = np.concatenate([x["image"][x["mask"] == 1] for x in batches])
    np.testing.assert_array_equal(images, demo.images)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"batch_size": 10, "num_replicas": 4}, ["10", "4 replicas"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"num_replicas": 2, "local_replicas": range(1, 3)}, ["range(1, 3)", "2 replicas"]),
        ({"local_replicas": range(0)}, ["range(0, 0)"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"first_step": -1}, ["first_step=-1"]),
    ],
)
def test_mistakes(demo, options, words):
    with pytest.raises(ValueError) as error:
        pipeline.make_train_data(
            demo, ops.parse("decode"), **{"batch_size": 8, "seed": 0, **options}
        )
    for word in words:
        assert word in str(error.value)


def test_images_of_varying_shape_are_refused(folder):
    with pytest.raises(ValueError, match=r"varying shape.*resize"):
        pipeline.make_train_data(folder, ops.parse("decode"), batch_size=2, seed=0)


def test_a_truncated_file_is_named(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    for i in range(40):
        path = tmp_path / "train" / "a" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    bad = tmp_path / "train" / "a" / "23.jpg"
    bad.write_bytes(bad.read_bytes()[:2000])
    source = open_source("folder", split="train", data_dir=str(tmp_path))  # its header is right
    pipe = ops.parse("decode_jpeg_and_inception_crop(8, area_min=99)")
    ds = pipeline.make_train_data(source, pipe, batch_size=40, seed=0)
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        take(ds, 1)
    for options in ({}, {"pipe": pipe, "indices": [39, 20]}):
        text = explain_data_error(source, error.value, **options)
        assert str(bad) in text and "Invalid JPEG" in text and "replace it or remove it" in text
    assert explain_data_error(source, ValueError("no")) is None
    bad.unlink()
    source = open_source("folder", split="train", data_dir=str(tmp_path))
    assert explain_data_error(source, error.value) is None


def test_an_image_that_is_too_small_for_the_pipe_is_named(folder):
    pipe = ops.parse("decode|central_crop(16)")
    ds = pipeline.make_train_data(folder, pipe, batch_size=30, seed=0)
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        take(ds, 1)
    text = explain_data_error(folder, error.value, pipe=pipe)
    assert ".jpg" in text and "example" in text
    assert explain_data_error(folder, error.value) is None  # each of them decodes


def test_distributes_replica_by_replica(demo, cpus):
    strategy = tf.distribute.MirroredStrategy(cpus[:2])
    pipe = ops.parse(PIPE)

    def make(context):
        return pipeline.make_train_data(
            demo,
            pipe,
            batch_size=BATCH,
            seed=7,
            num_replicas=2,
            local_replicas=range(2),
        )

    iterator = iter(strategy.distribute_datasets_from_function(make))
    want = steps(demo, pipe, 2, replicas=2)
    for expected in want:
        parts = strategy.experimental_local_results(next(iterator)["index"])
        np.testing.assert_array_equal(np.concatenate(parts), expected["index"])


def _drop_iterators():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")

    def make(_):
        # Slow enough to be at work when the iterator goes.
        slow = tf.data.Dataset.range(3).map(
            lambda i: tf.reduce_sum(tf.random.stateless_uniform([400_000], [1, i]))
        )
        return pipeline.finish(slow.repeat(), num_threads=None, prefetch=1, damage=None)

    for _ in range(10):
        next(iter(strategy.distribute_datasets_from_function(make)))


def test_an_iterator_can_be_dropped_while_it_prefetches(tmp_path):
    # As when an evaluation is given up.
    code, text = processes.call(_drop_iterators, log=tmp_path / "log")
    assert code == 0, f"exit code {code}: {text[-2000:]}"
