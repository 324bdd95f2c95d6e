"""From (seed, step) to batches: which examples, in which order, with which augmentation.

Number the examples of a run p = step * batch_size + replica * b + j: the j-th of the b that
`replica` gets. With N examples in the source (one that is no mixture, and without repeats), p is in
epoch p // N, and is example number p % N of that epoch's permutation. Both are computed from p
alone, so a resume replays nothing, and neither threads nor hosts nor replicas change a batch.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.data import order
from vit_dist.data.damage import POSITION, Damage, masking
from vit_dist.data.mixing import Mixing
from vit_dist.data.ops.pipe import POSITION_SPEC, Pipe, output_spec
from vit_dist.data.sources import labels
from vit_dist.data.sources.source import Source

# A call into tf.data costs about 50 us, as much as decoding a small image; so one call handles up
# to 32 examples. Larger chunks would only hold more images in memory per thread.
MAX_CHUNK = 32
# Keys to tensors, each with a leading axis for the examples of a chunk or batch.
Tensors = dict[str, tf.Tensor]
# (k, n): keep elements k, k + n, k + 2n, ... only. k may be a tensor: a data service is sent one
# graph for all k.
Part = tuple[tf.Tensor | int, int]
ALL: Part = (0, 1)

MASK_SPEC = tf.TensorSpec((), tf.float32)  # of one example
PREFETCH = 4  # batches of one replica; more smooths uneven read times and takes more memory


# The functions below need no AutoGraph, whose work would be a part of each start.
@tf.autograph.experimental.do_not_convert
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
    labels_sum_to_one: bool = True,
) -> tf.data.Dataset:
    """Returns an endless dataset of batches.

    One element is the batch of one replica. Elements come ordered by step, and within a step by
    this host's replicas.

    Args:
      source: Where examples are read.
      pipe: Its host ops are applied here; its device op runs later, in the step.
      batch_size: Global.
      seed: In [0, 2**62). Decides, with the step, all that is in a batch.
      first_step: Number of the first step; the cost does not grow with it if `source.indexable`.
      num_replicas: Replicas that share a global batch.
      local_replicas: Which of them this host feeds.
      num_threads: For reading and preprocessing; None lets tf.data choose.
      prefetch: Elements prepared ahead.
      mixing: Adds the key "mix", (b, 6) float32: the argument `rows` of mixing.images and
        mixing.labels, which run in the step.
      repeats: How often each example stands in its batch, each time augmented anew.
      damage: If given: adds the key "mask", (b,) float32, 1 for a good example; one that cannot be
        used (unreadable, or of no class) becomes zeros with a mask of 0, and is counted there. If
        None: such an example makes the iterator raise.
      part: (k, n): keep only elements k, k + n, k + 2n, ..., counted from 0 at `first_step`.
      only: Keep only the first so many examples (at most all) of the first element; nothing else is
        read. For previews.
      labels_sum_to_one: Whether a label that is a row of shares must be a distribution, as softmax
        cross-entropy needs it; a sigmoid loss takes several whole classes.

    Returns:
      Dicts of what the pipe keeps, each (batch_size / num_replicas, ...), static.

    Raises:
      ConfigError: Numbers that do not fit each other, or a pipe that does not fit the source.
    """
    spec = _check(source, pipe, batch_size, num_replicas, local_replicas)
    _check_training(source, seed, first_step, repeats)
    # Only here, as it may download: wrong arguments fail before any data is touched.
    source.prepare()
    # Positions become records (what to read, and the seed), records become chunks of preprocessed
    # examples, and chunks are joined to batches.
    per_replica = batch_size // num_replicas
    kept = min(only or per_replica, per_replica)
    first_position = first_step * batch_size
    cut = _Cut(batch_size, per_replica, kept, first_position, local_replicas, part)
    if source.indexable:
        draw = functools.partial(train_records, source, seed=seed, batch_size=batch_size)
        draw = functools.partial(draw, repeats=repeats)
        # Which example stands where is computed from the positions of this host alone.
        records = _positions(cut).map(lambda p: {**draw(p), POSITION: p}, _parallel(num_threads))
    else:
        # A stream must be read from the beginning of its epoch, the records of other hosts too.
        records = _local_chunks(_train_stream(source, seed, first_position), cut)
        records = records.map(lambda p, record: _add_train_seeds(source, p, record, seed))
    # take(-1) keeps all; a preview needs the chunks of its one element and no more.
    records = records.take(-1 if only is None else kept // _chunk(kept))
    make_chunk = _chunk_maker(source, pipe, _with_mask(spec, damage), labels_sum_to_one)
    ds = _batches(make_chunk, records, kept, spec, num_threads, damage)
    # Rows are drawn for whole batches, so this comes after chunks are joined.
    if mixing is not None:
        ds = _with_rows(ds, mixing, cut, seed, tuple(spec["image"].shape[:2]))
    return finish(ds, num_threads, prefetch, damage)


@tf.autograph.experimental.do_not_convert
def make_eval_data(
    source: Source,
    pipe: Pipe,
    *,
    batch_size: int,
    num_replicas: int = 1,
    local_replicas: range = range(1),
    num_threads: int | None = None,
    damage: Damage | None = None,
    labels_sum_to_one: bool = True,
) -> tf.data.Dataset:
    """Returns batches that hold each example once over all replicas, in the source's order.

    Arguments and errors as in `make_train_data`; elements come in the same order. The last global
    batch is padded by repeating the last example, or the first one for streams, so that all
    replicas get equally many batches.

    Returns:
      A finite dataset of dicts with what the pipe keeps, and "mask", (b,) float32: 1 for an
      example, 0 for padding and, given `damage`, for examples that cannot be used.
    """
    spec = _check(source, pipe, batch_size, num_replicas, local_replicas)
    spec["mask"] = MASK_SPEC
    source.prepare()
    per_replica = batch_size // num_replicas
    # Rounded up: what is missing in the last global batch is padding.
    num_steps = -(-source.num_examples // batch_size)
    cut = _Cut(batch_size, per_replica, per_replica, 0, local_replicas, ALL)
    if source.indexable:
        # Positions beyond the last example are padding. They read that example again, and
        # _add_eval_seeds gives them a mask of 0.
        num_chunks = num_steps * len(local_replicas) * per_replica // _chunk(per_replica)
        last = source.num_examples - 1
        records = _positions(cut).take(num_chunks)
        records = records.map(lambda p: _add_eval_seeds(source, p, {"index": tf.minimum(p, last)}))
    else:
        # A stream cannot be asked for its last record without reading all of it, so its first one,
        # read a second time, is the padding.
        stream = source.stream(seed=None, epoch=0)
        padding = stream.take(1).repeat(num_steps * batch_size - source.num_examples)
        records = _local_chunks(stream.concatenate(padding).enumerate(), cut)
        records = records.map(lambda p, record: _add_eval_seeds(source, p, record))
    make_chunk = _chunk_maker(source, pipe, spec, labels_sum_to_one)
    ds = _batches(make_chunk, records, per_replica, spec, num_threads, damage)
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
    drawn = train_records(source, positions, seed=seed, batch_size=batch_size, repeats=repeats)
    return drawn["index"].numpy()


def check_pipe(source: Source, pipe: Pipe) -> dict[str, tf.TensorSpec]:
    """Returns the spec of one preprocessed example; reads nothing and touches no device.

    Raises:
      ConfigError: The pipe does not fit the source, or makes labels of another number of classes.
    """
    spec = output_spec(source, pipe)
    shape = spec["label"].shape if "label" in spec else tf.TensorShape(())
    # Labels are class numbers (rank 0) until an op such as onehot makes rows of them.
    if shape.rank != 0 and shape != (source.num_classes,):
        raise ConfigError(
            f"pipe {str(pipe)!r} makes labels of shape {tuple(shape)}, and {source} has "
            f"{source.num_classes} classes: write onehot(num_classes)"
        )
    return spec


def _check(
    source: Source, pipe: Pipe, batch_size: int, num_replicas: int, local: range
) -> dict[str, tf.TensorSpec]:
    """Raises ConfigError for what cannot work; returns the spec of one preprocessed example."""
    if batch_size < 1 or batch_size % num_replicas:
        raise ConfigError(
            f"batch_size={batch_size} must be a positive multiple of the {num_replicas} replicas"
        )
    if not local or local.step != 1 or local.start < 0 or local.stop > num_replicas:
        raise ConfigError(f"local_replicas={local} must be a range within {num_replicas} replicas")
    spec = check_pipe(source, pipe)
    # This entry tells what the device op will make of the image; no batch carries it.
    del spec["device_image"]
    return spec


def _check_training(source: Source, seed: int, first_step: int, repeats: int) -> None:
    if repeats < 1:
        raise ConfigError(f"repeats={repeats} must be at least 1")
    if repeats > 1 and not source.indexable:
        raise ConfigError(f"repeats={repeats} must be 1: {source} is streamed")
    # order.seed_words splits a seed into two numbers of 31 bits.
    if not 0 <= seed < order.MAX_SEED:
        raise ConfigError(f"seed={seed} must be in [0, 2**62)")
    if first_step < 0:
        raise ConfigError(f"first_step={first_step} must be 0 or more")


def _chunk(count: int) -> int:
    """Returns how many examples are handled at a time: the largest divisor up to MAX_CHUNK."""
    # A divisor, so that every chunk has the same static shape and batches hold whole chunks.
    return max(n for n in range(1, MAX_CHUNK + 1) if count % n == 0)


def _parallel(num_threads: int | None) -> int:
    return tf.data.AUTOTUNE if num_threads is None else num_threads


class _Cut(NamedTuple):
    """Which positions of a run make up this host's elements."""

    batch_size: int  # global
    per_replica: int  # examples
    kept: int  # of these, how many are made: the first so many
    first_position: int  # of the first step
    local: range  # this host's replicas
    part: Part


def _positions(cut: _Cut) -> tf.data.Dataset:
    """Yields the (chunk,) int64 positions of this host, one replica's batch after the other."""
    chunk = _chunk(cut.kept)
    # Counted by chunks, as tf.data is: chunk number i belongs to element i // chunks.
    chunks = cut.kept // chunk  # of one element
    begin, stride = cut.part

    def of_chunk(i: tf.Tensor) -> tf.Tensor:
        element = begin + i // chunks * stride
        # Elements go round this host's replicas, which are neighbours, and then on to the next
        # step. So do their positions: steps are batch_size apart, replicas per_replica.
        step = element // len(cut.local)
        replica = cut.local.start + element % len(cut.local)
        start = replica * cut.per_replica + i % chunks * chunk
        first = cut.first_position + step * cut.batch_size + start
        return first + tf.range(chunk, dtype=tf.int64)

    return tf.data.Dataset.counter().map(of_chunk)


def _local_chunks(stream: tf.data.Dataset, cut: _Cut) -> tf.data.Dataset:
    """Keeps the (position, record) pairs of this host and batches them into chunks."""
    begin, stride = cut.part

    def is_local(position: tf.Tensor, _) -> tf.Tensor:
        # The way back from a position to the number of its element; see _positions.
        position -= cut.first_position
        replica = position % cut.batch_size // cut.per_replica
        element = position // cut.batch_size * len(cut.local) + replica - cut.local.start
        mine = (element >= begin) & ((element - begin) % stride == 0)
        return (replica >= cut.local.start) & (replica < cut.local.stop) & mine

    # drop_remainder drops nothing, as streams are endless or padded to whole batches; it makes the
    # shapes static.
    return stream.filter(is_local).batch(_chunk(cut.kept), drop_remainder=True)


def train_records(
    source: Source, positions: tf.Tensor, *, seed: int, batch_size: int, repeats: int
) -> Tensors:
    """Returns which example stands at each position of a run, with its epoch and its seed.

    Args:
      source: Read by index.
      positions: (B,) int64.
      seed: Of the run.
      batch_size: Global.
      repeats: Copies of each example in a batch.

    Returns:
      "index" and "epoch", (B,) int64, and "seed", (B, 2) int32.
    """
    # `slots` are the positions of a run without repeats: all copies of an example share one.
    slots, copy = order.repeat_in_batch(positions, batch_size=batch_size, repeats=repeats)
    epoch, index = source.place(slots, seed=seed)
    # A copy gets the seed that its example would have in another epoch, so copies are augmented
    # differently.
    seeds = order.example_seeds(epoch * repeats + copy, index, seed=seed)
    return {"index": index, "epoch": epoch, "seed": seeds}


def _add_eval_seeds(source: Source, positions: tf.Tensor, records: Tensors) -> Tensors:
    epoch = tf.zeros_like(positions)
    # Evaluation pipes may still contain random ops, which need a seed: one for each example.
    seeds = tf.cast(tf.stack([epoch, records["index"]], axis=1), tf.int32)
    mask = tf.cast(positions < source.num_examples, tf.float32)
    return {**records, "epoch": epoch, "seed": seeds, "mask": mask, POSITION: positions}


def _train_stream(source: Source, seed: int, first: int) -> tf.data.Dataset:
    """Yields (position, record) from position `first` on, over all epochs."""
    # In the first epoch the records that were trained on before are skipped; later epochs are read
    # whole.
    first_epoch, skip = divmod(first, source.num_examples)
    words = tf.constant(order.seed_words(seed), tf.int32)

    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        ds = source.stream(seed=words, epoch=epoch)
        return ds.skip(tf.where(epoch == first_epoch, tf.constant(skip, tf.int64), 0))

    return tf.data.Dataset.counter(first_epoch).flat_map(one_epoch).enumerate(first)


def _add_train_seeds(source: Source, positions: tf.Tensor, records: Tensors, seed: int) -> Tensors:
    epoch = positions // source.num_examples
    seeds = order.example_seeds(epoch, records["index"], seed=seed)
    return {**records, "epoch": epoch, "seed": seeds, POSITION: positions}


def _with_mask(spec: dict[str, tf.TensorSpec], damage: Damage | None) -> dict[str, tf.TensorSpec]:
    return spec if damage is None else {**spec, "mask": MASK_SPEC}


def _batches(
    make_chunk: Callable[[Tensors], Tensors],
    records: tf.data.Dataset,
    count: int,
    spec: dict[str, tf.TensorSpec],
    num_threads: int | None,
    damage: Damage | None,
) -> tf.data.Dataset:
    """Turns chunks of records into batches of `count` examples, each as `spec` describes."""
    spec = _with_mask(spec, damage)
    if damage is not None:
        make_chunk = masking(make_chunk, records.element_spec, spec, damage)

    def join(chunks: Tensors) -> Tensors:
        # (chunks, examples of a chunk, ...) -> (examples of the batch, ...), with a static shape.
        return {key: tf.reshape(chunks[key], (count, *spec[key].shape)) for key in spec}

    # The map may make chunks out of order; `finish` asks for them in order.
    ds = records.map(make_chunk, _parallel(num_threads))
    return ds.batch(count // _chunk(count), drop_remainder=True).map(join)


def _chunk_maker(
    source: Source, pipe: Pipe, spec: dict[str, tf.TensorSpec], labels_sum_to_one: bool
) -> Callable[[Tensors], Tensors]:
    """Returns make_chunk: indices (or streamed records) -> preprocessed examples, batched.

    Both are dicts of tensors with a leading axis for the examples of the chunk.
    """

    def make_example(record: Tensors) -> Tensors:
        index = record["index"]
        place = {key: record[key] for key in POSITION_SPEC}
        # Only what the source itself put into the record is handed back to it.
        own = {key: value for key, value in record.items() if key not in (*place, "mask", POSITION)}
        # Labels are checked before the image is decoded, and before an op of the pipe changes them.
        example = source.decode_record(own)
        if source.element_spec["label"].shape.rank == 0:
            label = labels.check(example["label"], source.num_classes, index)
            example = {**example, "label": label}
        made = pipe.host_each({**example, **place})
        if labels_sum_to_one and "label" in made and made["label"].shape.rank == 1:
            made = {**made, "label": labels.check_shares(made["label"], index)}
        # An evaluation's record has a mask already, which is 0 for padding.
        mask = {"mask": record.get("mask", tf.constant(1.0))} if "mask" in spec else {}
        return {**made, **mask}

    def make_chunk(chunk: Tensors) -> Tensors:
        if source.indexable:
            chunk = {**chunk, **source.fetch(chunk["index"])}
        # host_each makes one example at a time in this loop; the pipe's compiled ops follow on the
        # whole chunk at once, and draw from the "seed" that each example then still carries.
        each = {**spec, "seed": POSITION_SPEC["seed"]} if pipe.compiled_tail else spec
        # One example at a time: chunks are made in parallel already.
        examples = tf.map_fn(make_example, chunk, parallel_iterations=1, fn_output_signature=each)
        return pipe.host_chunk(examples)

    return make_chunk


def _with_rows(
    ds: tf.data.Dataset, mixing: Mixing, cut: _Cut, seed: int, size: tuple[int, int]
) -> tf.data.Dataset:
    """Draws the mixing rows of each global batch and adds a replica's slice of them as "mix"."""
    begin, stride = cut.part

    def add(i: tf.Tensor, batch: Tensors) -> Tensors:
        element = begin + i * stride
        step = cut.first_position // cut.batch_size + element // len(cut.local)
        rows = mixing.draw(step, seed=seed, batch_size=cut.batch_size, size=size)
        # Every host draws the rows of the whole batch, which costs little, and keeps its own.
        start = (cut.local.start + element % len(cut.local)) * cut.per_replica
        rows = tf.ensure_shape(rows[start : start + cut.kept], (cut.kept, 6))
        if "mask" in batch:
            # Only damaged examples have a mask of 0 here; training has no padding.
            rows = mixing.spare_masked(rows, batch["mask"])
        return {**batch, "mix": rows}

    return ds.enumerate().map(add)


def finish(
    ds: tf.data.Dataset, num_threads: int | None, prefetch: int, damage: Damage | None
) -> tf.data.Dataset:
    """Returns the dataset in a fixed order, prefetched, and not sharded by TensorFlow.

    Each host reads its own examples already.
    """
    ds = ds.prefetch(prefetch)
    options = tf.data.Options()
    options.deterministic = True
    # TensorFlow's rewrites of the graph stay on. They find nothing here and cost a tenth of a
    # second at each start, but without any, a distributed data set's iterator does not own what it
    # reads: dropped while it prefetches, it reads freed memory (TensorFlow 2.21: a segmentation
    # fault).
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    if damage is not None:
        # A chunk that may be masked is made by a TensorFlow function, which is called from a Python
        # function, which tf.data calls. The outer call blocks a thread until the inner one is done,
        # and if both came from one pool of few threads, all could be blocked. So tf.data gets a
        # pool of its own, and the common one is left to the inner functions.
        num_threads = num_threads or os.cpu_count()
    if num_threads is not None:
        options.threading.private_threadpool_size = num_threads
    return ds.with_options(options)
