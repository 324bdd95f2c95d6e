"""Law 1 from end to end: pixels and numbers of a batch, whatever the threads, workers and start."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from tests.support import images, tiny
from vit_dist.cluster.strategy import make_strategy
from vit_dist.data import order, pipeline
from vit_dist.data.mixing import make_mixing
from vit_dist.data.ops import basic as ops
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.open import open_source
from vit_dist.run.check import check
from vit_dist.run.input import train_data

BATCH, COUNT = 12, 30
CROP = (
    "decode_jpeg_and_inception_crop(8)|flip_lr|value_range(-1, 1)"
    "|keep('image', 'label', 'index', 'epoch')"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same 30 images in every form that is read by index."""
    root = tmp_path_factory.mktemp("data")
    images.write_folder(root / "folder", count=COUNT)
    folder = open_source("folder", split="train", data_dir=str(root / "folder"))
    convert(folder, root / "shards", split="train", examples_per_shard=8)
    images.write_tfrecords(root / "records", (11, 19), num_classes=2)
    part = {"source": "folder", "data_dir": str(root / "folder")}
    options = {
        "folder": {"data_dir": str(root / "folder")},
        "array_record": {"data_dir": str(root / "shards")},
        "tfrecord": {"files": f"{root}/records/*", "num_classes": 2},
        "mixture": {"parts": [{**part, "weight": 1}, {**part, "weight": 2}]},
    }
    return {k: open_source(k, split="train", **v) for k, v in options.items()}


def global_batches(source, first, count=2, *, threads=2, workers=1, **options):
    """From all workers, each with one replica."""
    parts = []
    for worker in range(workers):
        ds = pipeline.make_train_data(
            source,
            ops.parse(CROP),
            batch_size=BATCH,
            seed=11,
            first_step=first,
            num_replicas=workers,
            local_replicas=range(worker, worker + 1),
            num_threads=threads,
            mixing=make_mixing(mixup_alpha=1.0, mode="elem"),
            **options,
        )
        parts.append(list(ds.take(count).as_numpy_iterator()))
    return [{k: np.concatenate([p[k] for p in row]) for k in row[0]} for row in zip(*parts)]  # noqa: B905


def assert_equal(have, want):
    for a, b in itertools.zip_longest(have, want):
        for key in b:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# Of a folder without mixing: test_pipeline.py.
CHOSEN = [("array_record", 1), ("tfrecord", 100), ("mixture", 10**6)]


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        pytest.param(*case, marks=[] if case in CHOSEN else pytest.mark.exhaustive)
        for case in itertools.product(["folder", *dict(CHOSEN)], (1, 100, 10**6))
    ],
)
def test_threads_workers_and_starts(sources, kind, step):
    """A run that came to `step`, and one that resumes there with other threads and workers."""
    whole = global_batches(sources[kind], step - 1, threads=1)
    assert_equal(global_batches(sources[kind], step, 1, threads=4, workers=2), whole[1:])


def test_repeats_do_not_depend_on_the_machine(sources):
    want = global_batches(sources["folder"], 3, 1, repeats=3, threads=1)
    assert_equal(global_batches(sources["folder"], 3, 1, repeats=3, workers=2), want)


def test_forms_of_one_set_give_the_same_batches(sources):
    assert_equal(global_batches(sources["array_record"], 5), global_batches(sources["folder"], 5))


@pytest.mark.parametrize("repeats", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_late_start_reads_no_more_than_an_early_one(sources, repeats, monkeypatch):
    """Not a clock but the examples that are read until a few batches are there."""
    source, reads = sources["folder"], []
    fetch = source.fetch

    def counted(indices):
        noted = tf.numpy_function(lambda i: reads.extend(i.tolist()) or i, [indices], tf.int64)
        return fetch(tf.ensure_shape(noted, indices.shape))

    monkeypatch.setattr(source, "fetch", counted)
    for first in (0, 10**6):
        reads.clear()
        batches = global_batches(source, first, 3, threads=1, repeats=repeats)
        wanted = np.concatenate([b["index"] for b in batches]).tolist()
        assert reads[: len(wanted)] == wanted  # the first read is the first that is needed
        # Beyond: what is made ahead: `prefetch` batches, and a few between the stages.
        assert len(reads) <= len(wanted) + (pipeline.PREFETCH + 4) * BATCH


# repeated augmentation


def test_repeats_stand_apart_and_differ(sources):
    source = sources["folder"]
    batches = global_batches(source, 0, 10, repeats=3)
    for batch in batches:
        index = batch["index"].reshape(3, 4)
        assert (index == index[0]).all() and len(set(index[0])) == 4
    copies = np.concatenate([b["image"].reshape(3, 4, -1) for b in batches], axis=1)
    for one, other in itertools.combinations(copies, 2):  # crops of one colour are all the same
        assert (one != other).any(1).mean() > 0.5
    distinct = np.concatenate([b["index"][:4] for b in batches])
    plain = order.make_order(tf.range(40, dtype=tf.int64), num_examples=COUNT, seed=11)[1]
    np.testing.assert_array_equal(distinct, plain)  # the usual order, only slower


@pytest.mark.parametrize(("batch_size", "repeats"), [(12, 1), (12, 3), (10, 3), (8, 5), (4, 7)])
def test_positions_of_repeats(batch_size, repeats):
    positions = tf.range(3 * batch_size, dtype=tf.int64)
    slots, copies = order.repeat_in_batch(positions, batch_size=batch_size, repeats=repeats)
    slots, copies = slots.numpy().reshape(3, -1), copies.numpy().reshape(3, -1)
    distinct = -(-batch_size // repeats)
    for step in range(3):
        pairs = set(zip(slots[step], copies[step], strict=True))
        assert len(pairs) == batch_size
        assert set(slots[step]) == set(range(step * distinct, (step + 1) * distinct))
        counts = np.bincount(slots[step] - step * distinct)
        assert counts.max() <= repeats and counts.sum() == batch_size
        if batch_size % repeats == 0:
            assert (counts == repeats).all()
        # The copies of an example stand `distinct` places apart, each with its number.
        places = np.arange(batch_size)
        np.testing.assert_array_equal(slots[step], step * distinct + places % distinct)
        np.testing.assert_array_equal(copies[step], places // distinct)
    if repeats == 1:
        np.testing.assert_array_equal(slots.reshape(-1), positions)


def test_each_replica_has_one_copy(sources):
    """Of as many replicas as there are copies."""
    known = {"batch_size": BATCH, "seed": 1, "repeats": 3}
    known |= {"num_replicas": 3, "local_replicas": range(3)}
    ds = pipeline.make_train_data(sources["folder"], ops.parse(CROP), **known)
    # One step's replicas follow each other.
    elements = [b["index"].tolist() for b in ds.take(15).as_numpy_iterator()]
    parts = [elements[replica::3] for replica in range(3)]
    assert parts[0] == parts[1] == parts[2]
    assert all(len(set(index)) == BATCH // 3 for index in parts[0])


@pytest.mark.parametrize("repeats", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_only_the_first_examples(sources, repeats, monkeypatch):
    """What TensorBoard shows is the batch's beginning, and nothing else is read."""
    source, reads = sources["folder"], []
    (whole,) = global_batches(source, 5, 1, repeats=repeats)
    decode = source.decode_record

    def counted(record):
        noted = tf.numpy_function(lambda p: reads.append(p) or p, [record["path"]], tf.string)
        return decode({**record, "path": tf.ensure_shape(noted, ())})

    monkeypatch.setattr(source, "decode_record", counted)
    for count, kept in ((8, 8), (100, BATCH)):
        reads.clear()
        (first,) = global_batches(source, 5, 3, repeats=repeats, only=count)
        assert_equal([first], [{key: value[:kept] for key, value in whole.items()}])
        assert len(reads) == kept


def test_a_stream_has_no_repeats(tmp_path):
    images.write_tfrecords(tmp_path)
    options = {"files": f"{tmp_path}/*", "num_classes": 4, "stream": True}
    stream = open_source("tfrecord", split="train", **options)
    with pytest.raises(ValueError, match=r"repeats=2 must be 1: tfrecord.* is streamed"):
        pipeline.make_train_data(stream, ops.parse(CROP), batch_size=8, seed=0, repeats=2)


def test_a_config_with_repeats_is_wired(tmp_path):
    train_ops = "value_range(-1, 1)|keep('image', 'label', 'index')"
    options, data = check(tiny.make(input__repeats=4, input__train_ops=train_ops))
    batch = next(iter(train_data(options, data, make_strategy(name="single"), first_step=3)))
    index = batch["index"].numpy().reshape(4, 4)
    assert (index == index[0]).all() and len(set(index[0])) == 4
