"""From (seed, step) to batches: which examples, in which order, with which augmentation.

Position p of a run is step * batch_size + replica * b + j, for example j of the b that a replica
gets. Its epoch is p // N and its example that epoch's permutation of p % N: both are computed, so
nothing has to be replayed at a later start, and neither threads nor hosts nor replicas change a
batch.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vit_dist.data import order
from vit_dist.data.damage import Damage, masking
from vit_dist.data.mixing import Mixing
from vit_dist.data.ops.pipe import POSITION_SPEC, Pipe, output_spec
from vit_dist.data.sources.source import Source

# Examples handled by one call in tf.data, whose overhead (about 50 us) would be that of a small
# image; larger chunks only hold more images in memory per thread.
MAX_CHUNK = 32
Tensors = dict[str, tf.Tensor]
Part = tuple[tf.Tensor | int, int]
ALL: Part = (0, 1)

PREFETCH = 4  # batches of one replica; they hide the jitter of reading, and cost memory


def make_train_data(
    source: Source,
    pipe: Pipe,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    num_replicas: int = 1,
    local_replicas: range = range(1),
    num_threads: int | None = None,
    prefetch: int = PREFETCH,
    mixing: Mixing | None = None,
    repeats: int = 1,
    damage: Damage | None = None,
    part: Part = ALL,
    only: int | None = None,
) -> tf.data.Dataset:
    """Returns endless batches of one replica each: this host's replicas in turn, step after step.

    Args:
      source: Where examples are read.
      pipe: Its host part is applied here, its device part is left to the model's input.
      batch_size: Global.
      seed: In [0, 2**62). Decides, with the step, all that is in a batch.
      first_step: Number of the first step; the cost does not grow with it if `source.indexable`.
      num_replicas: Replicas that share a global batch.
      local_replicas: Which of them this host feeds.
      num_threads: For reading and preprocessing; None lets tf.data choose.
      prefetch: Batches of one replica prepared ahead.
      mixing: Adds "mix", (b, 6) float32: what its `images` and `labels` take on the accelerator.
      repeats: How often each example stands in its batch, each time augmented anew.
      damage: Given, an example that cannot be read becomes zeros with a "mask" ((b,) float32, else
        1) of 0, and is counted there; otherwise it is an error of the iterator.
      part: (k, n) leaves only elements k, k + n, k + 2n, ..., counted from 0 at `first_step`.
      only: Leaves one element, and of that so many examples (at most all), and reads no others.

    Returns:
      Dicts of what the pipe keeps, each (batch_size / num_replicas, ...), static.

    Raises:
      ValueError: Numbers that do not fit each other, or a pipe that does not fit the source.
    """
    spec = _check(source, pipe, batch_size, num_replicas, local_replicas)
    _check_training(source, seed, first_step, repeats)
    source.prepare()
    share = batch_size // num_replicas
    kept = min(only or share, share)
    cut = _Cut(batch_size, share, kept, first_step * batch_size, local_replicas, part)
    if source.indexable:
        place = functools.partial(places, source, seed=seed, batch_size=batch_size, repeats=repeats)
        records = _positions(cut).map(place, _parallel(num_threads))
    else:
        records = _local_chunks(_train_stream(source, seed, cut.first), cut)
        records = records.map(lambda p, record: _placed(source, p, record, seed))
    records = records.take(-1 if only is None else kept // _chunk(kept))
    ds = _batches(source, pipe, records, kept, spec, num_threads, damage)
    if mixing is not None:
        ds = _with_rows(ds, mixing, cut, seed, tuple(spec["image"].shape[:2]))
    return finish(ds, num_threads, prefetch, damage)


def make_eval_data(
    source: Source,
    pipe: Pipe,
    *,
    batch_size: int,
    num_replicas: int = 1,
    local_replicas: range = range(1),
    num_threads: int | None = None,
    damage: Damage | None = None,
) -> tf.data.Dataset:
    """Returns batches that hold each example once over all replicas, in the source's order.

    Arguments, order of elements and errors are those of `make_train_data`. The last global batch is
    padded with the last example (streams: the first), so all replicas get equally many batches.

    Returns:
      A finite dataset of dicts with what the pipe keeps, and "mask", (b,) float32: 1 for an
      example, 0 for padding and, given `damage`, for examples that cannot be read.
    """
    spec = _check(source, pipe, batch_size, num_replicas, local_replicas)
    spec["mask"] = tf.TensorSpec((), tf.float32)
    source.prepare()
    share = batch_size // num_replicas
    num_steps = -(-source.num_examples // batch_size)
    cut = _Cut(batch_size, share, share, 0, local_replicas, ALL)
    if source.indexable:
        positions = _positions(cut).take(num_steps * len(local_replicas) * share // _chunk(share))
        last = source.num_examples - 1
        records = positions.map(lambda p: _eval_place(source, p, {"index": tf.minimum(p, last)}))
    else:
        stream = source.stream(seed=None, epoch=0)
        padding = stream.take(1).repeat(num_steps * batch_size - source.num_examples)
        records = _local_chunks(stream.concatenate(padding).enumerate(), cut)
        records = records.map(lambda p, record: _eval_place(source, p, record))
    ds = _batches(source, pipe, records, share, spec, num_threads, damage)
    return finish(ds, num_threads, PREFETCH, damage)


def train_indices(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    num_steps: int,
    repeats: int = 1,
) -> np.ndarray:
    """Returns the numbers of these steps' examples, (num_steps * batch_size,) int64."""
    start = first_step * batch_size
    positions = tf.range(start, start + num_steps * batch_size, dtype=tf.int64)
    where = places(source, positions, seed=seed, batch_size=batch_size, repeats=repeats)
    return where["index"].numpy()


def _check(
    source: Source, pipe: Pipe, batch_size: int, num_replicas: int, local: range
) -> dict[str, tf.TensorSpec]:
    """Raises ValueError for what cannot work; returns the spec of one preprocessed example."""
    if batch_size < 1 or batch_size % num_replicas:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of the {num_replicas} replicas"
        )
    if not local or local.step != 1 or local.start < 0 or local.stop > num_replicas:
        raise ValueError(f"local_replicas={local} must be a range within {num_replicas} replicas")
    spec = output_spec(source, pipe)
    del spec["device_image"]
    return spec


def _check_training(source: Source, seed: int, first_step: int, repeats: int) -> None:
    if repeats < 1 or (repeats > 1 and not source.indexable):
        raise ValueError(f"repeats={repeats} must be 1 or more, and 1 for {source} if streamed")
    if not 0 <= seed < order.MAX_SEED:
        raise ValueError(f"seed={seed} must be in [0, 2**62)")
    if first_step < 0:
        raise ValueError(f"first_step={first_step} must be 0 or more")


def _chunk(share: int) -> int:
    """Returns how many examples are handled at a time: a divisor of a replica's batch."""
    return max(n for n in range(1, MAX_CHUNK + 1) if share % n == 0)


def _parallel(num_threads: int | None) -> int:
    return tf.data.AUTOTUNE if num_threads is None else num_threads


class _Cut(NamedTuple):
    """Which positions of a run make up this host's elements."""

    batch_size: int
    share: int  # of it, a replica's
    kept: int  # of that, from its beginning on
    first: int  # position
    local: range
    part: Part


def _positions(cut: _Cut) -> tf.data.Dataset:
    """Yields the (chunk,) int64 positions of this host, one replica's batch after the other."""
    chunk = _chunk(cut.kept)
    chunks = cut.kept // chunk
    begin, stride = cut.part

    def of_chunk(i: tf.Tensor) -> tf.Tensor:
        element = begin + i // chunks * stride
        # A host's replicas are neighbours, so its examples of one step are too.
        replica = cut.local.start + element % len(cut.local)
        start = replica * cut.share + i % chunks * chunk
        step = element // len(cut.local)
        return cut.first + step * cut.batch_size + start + tf.range(chunk, dtype=tf.int64)

    return tf.data.Dataset.counter().map(of_chunk)


def _local_chunks(stream: tf.data.Dataset, cut: _Cut) -> tf.data.Dataset:
    """Keeps, of (position, record), this host's; batched by chunks."""
    begin, stride = cut.part

    def is_local(position: tf.Tensor, _) -> tf.Tensor:
        position -= cut.first
        replica = position % cut.batch_size // cut.share
        element = position // cut.batch_size * len(cut.local) + replica - cut.local.start
        mine = (element >= begin) & ((element - begin) % stride == 0)
        return (replica >= cut.local.start) & (replica < cut.local.stop) & mine

    return stream.filter(is_local).batch(_chunk(cut.kept), drop_remainder=True)


def places(
    source: Source, positions: tf.Tensor, *, seed: int, batch_size: int, repeats: int
) -> Tensors:
    """Returns which example stands at each position, with its epoch and seed."""
    slots, copy = order.repeat_in_batch(positions, batch_size=batch_size, repeats=repeats)
    epoch, index = source.place(slots, seed=seed)
    seeds = order.example_seeds(epoch * repeats + copy, index, seed=seed)
    return {"index": index, "epoch": epoch, "seed": seeds}


def _eval_place(source: Source, positions: tf.Tensor, records: Tensors) -> Tensors:
    epoch = tf.zeros_like(positions)
    # For pipes that augment all the same.
    seeds = tf.cast(tf.stack([epoch, records["index"]], axis=1), tf.int32)
    mask = tf.cast(positions < source.num_examples, tf.float32)
    return {**records, "epoch": epoch, "seed": seeds, "mask": mask}


def _train_stream(source: Source, seed: int, first: int) -> tf.data.Dataset:
    """Yields (position, record) from position `first` on, over all epochs."""
    first_epoch, skip = divmod(first, source.num_examples)
    words = tf.constant(order.seed_words(seed), tf.int32)

    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        ds = source.stream(seed=words, epoch=epoch)
        return ds.skip(tf.where(epoch == first_epoch, tf.constant(skip, tf.int64), 0))

    return tf.data.Dataset.counter(first_epoch).flat_map(one_epoch).enumerate(first)


def _placed(source: Source, positions: tf.Tensor, records: Tensors, seed: int) -> dict:
    epoch = positions // source.num_examples
    seeds = order.example_seeds(epoch, records["index"], seed=seed)
    return {**records, "epoch": epoch, "seed": seeds}


def _batches(
    source: Source,
    pipe: Pipe,
    records: tf.data.Dataset,
    share: int,
    spec: dict[str, tf.TensorSpec],
    num_threads: int | None,
    damage: Damage | None,
) -> tf.data.Dataset:
    """Turns chunks of records into batches of `share` examples, as `spec` says each is."""
    if damage is not None:
        spec["mask"] = tf.TensorSpec((), tf.float32)
    make_chunk: Callable[[Tensors], Tensors] = _chunk_maker(source, pipe, spec)
    if damage is not None:
        make_chunk = masking(make_chunk, records.element_spec, spec, damage)

    def join(chunks: Tensors) -> Tensors:
        return {key: tf.reshape(chunks[key], (share, *spec[key].shape)) for key in spec}

    ds = records.map(make_chunk, _parallel(num_threads))
    return ds.batch(share // _chunk(share), drop_remainder=True).map(join)


def _chunk_maker(source: Source, pipe: Pipe, spec: dict[str, tf.TensorSpec]):
    """Makes make_chunk: places (and records, if streamed) -> examples; a leading axis each."""

    def make_example(record: Tensors) -> Tensors:
        place = {key: value for key, value in record.items() if key in (*POSITION_SPEC, "mask")}
        own = {key: value for key, value in record.items() if key not in place}
        mask = {"mask": place.pop("mask", tf.constant(1.0))} if "mask" in spec else {}
        return {**pipe.host_each({**source.decode_record(own), **place}), **mask}

    def make_chunk(chunk: Tensors) -> Tensors:
        if source.indexable:
            chunk = {**chunk, **source.fetch(chunk["index"])}
        each = {**spec, "seed": POSITION_SPEC["seed"]} if pipe.compiled_tail else spec
        examples = tf.map_fn(make_example, chunk, parallel_iterations=1, fn_output_signature=each)
        return pipe.host_chunk(examples)

    return make_chunk


def _with_rows(
    ds: tf.data.Dataset, mixing: Mixing, cut: _Cut, seed: int, size: tuple[int, int]
) -> tf.data.Dataset:
    """Adds each replica's part of what is drawn for the global batch."""
    begin, stride = cut.part

    def add(i: tf.Tensor, batch: Tensors) -> Tensors:
        element = begin + i * stride
        step = cut.first // cut.batch_size + element // len(cut.local)
        rows = mixing.draw(step, seed=seed, batch_size=cut.batch_size, size=size)
        start = (cut.local.start + element % len(cut.local)) * cut.share
        rows = tf.ensure_shape(rows[start : start + cut.kept], (cut.kept, 6))
        if "mask" in batch:
            rows = mixing.spare_masked(rows, batch["mask"])
        return {**batch, "mix": rows}

    return ds.enumerate().map(add)


def finish(
    ds: tf.data.Dataset, num_threads: int | None, prefetch: int, damage: Damage | None
) -> tf.data.Dataset:
    """Returns the dataset in a fixed order, each host with its own, `prefetch` elements ahead."""
    ds = ds.prefetch(prefetch)
    options = tf.data.Options()
    options.deterministic = True
    # Each host reads its own share already.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    if damage is not None:
        # Masking runs TensorFlow functions inside of a call to Python: they need a thread of the
        # common pool while that call waits in one of these.
        num_threads = num_threads or os.cpu_count()
    if num_threads is not None:
        options.threading.private_threadpool_size = num_threads
    return ds.with_options(options)
