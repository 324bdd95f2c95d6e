"""From (seed, step) to batches: which examples, in which order, with which augmentation.

Position p of a run is step * batch_size + replica * b + j, for example j of the b that a replica
gets. Its epoch is p // N and its example that epoch's permutation of p % N: both are computed, so
nothing has to be replayed at a later start, and neither threads nor hosts nor replicas change a
batch.
"""

import re
from collections.abc import Sequence
from concurrent import futures

import tensorflow as tf

from vit_dist.data import order
from vit_dist.data.base import Source
from vit_dist.data.pipe import POSITION_SPEC, Pipe, output_spec

# Examples handled by one call in tf.data, whose overhead (about 50 us) would be that of a small
# image; larger chunks only hold more images in memory per thread.
MAX_CHUNK = 32
MAX_EXAMINED = 20_000  # a minute or two of decoding on a small machine
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
) -> tf.data.Dataset:
    """Returns endless training batches, from `first_step` on.

    An element is one replica's batch: replica after replica of this host, then step after step,
    as `strategy.distribute_datasets_from_function` takes them.

    Args:
      source: Where examples are read.
      pipe: Its host part is applied here, its device part is left to the model's input.
      batch_size: Global number of examples per step.
      seed: In [0, 2**62). Decides, with the step, all that is in a batch.
      first_step: Number of the first step; the cost does not grow with it if `source.indexable`.
      num_replicas: Replicas that share a global batch.
      local_replicas: Which of them this host feeds.
      num_threads: Threads for reading and preprocessing; None lets tf.data choose.
      prefetch: Batches of one replica prepared ahead.

    Returns:
      A dataset of dicts with what the pipe keeps, each (batch_size / num_replicas, ...), static.

    Raises:
      ValueError: Numbers that do not fit each other, or a pipe that does not fit the source.
    """
    spec = _check(source, pipe, batch_size, num_replicas, local_replicas)
    if not 0 <= seed < order.MAX_SEED:
        raise ValueError(f"seed={seed} must be in [0, 2**62)")
    if first_step < 0:
        raise ValueError(f"first_step={first_step} must be 0 or more")
    source.prepare()
    share = batch_size // num_replicas
    first = first_step * batch_size
    if source.indexable:
        positions = _positions(batch_size, share, first, local_replicas)
        records = positions.map(lambda p: _train_records(source, p, seed), _parallel(num_threads))
    else:
        stream = _train_stream(source, seed, first)
        stream = stream.filter(lambda p, _: _is_local(p, batch_size, share, local_replicas))
        records = stream.batch(_chunk(share), drop_remainder=True)
        records = records.map(lambda p, record: _placed(source, p, record, seed))
    return _batches(source, pipe, records, share, spec, num_threads, prefetch)


def make_eval_data(
    source: Source,
    pipe: Pipe,
    *,
    batch_size: int,
    num_replicas: int = 1,
    local_replicas: range = range(1),
    num_threads: int | None = None,
) -> tf.data.Dataset:
    """Returns batches that hold each example once over all replicas, in the source's order.

    Arguments, order of elements and errors are those of `make_train_data`. The last global batch is
    padded with the last example (streams: the first), so all replicas get equally many batches.

    Returns:
      A finite dataset of dicts with what the pipe keeps, and "mask", (b,) float32: 1 for an
      example, 0 for padding.
    """
    spec = _check(source, pipe, batch_size, num_replicas, local_replicas)
    spec["mask"] = tf.TensorSpec((), tf.float32)
    source.prepare()
    share = batch_size // num_replicas
    num_steps = -(-source.num_examples // batch_size)
    if source.indexable:
        positions = _positions(batch_size, share, 0, local_replicas, num_steps)
        records = positions.map(lambda p: _eval_records(source, p), _parallel(num_threads))
    else:
        stream = source.stream(seed=None, epoch=0)
        padding = stream.take(1).repeat(num_steps * batch_size - source.num_examples)
        stream = stream.concatenate(padding).enumerate()
        stream = stream.filter(lambda p, _: _is_local(p, batch_size, share, local_replicas))
        records = stream.batch(_chunk(share), drop_remainder=True)
        records = records.map(lambda p, record: _eval_place(source, p, record))
    return _batches(source, pipe, records, share, spec, num_threads, PREFETCH)


def explain_data_error(
    source: Source,
    error: Exception,
    *,
    pipe: Pipe | None = None,
    indices: Sequence[int] = (),
    max_examples: int = MAX_EXAMINED,
) -> str | None:
    """Finds which example makes the data fail, as TensorFlow's own error does not name it.

    Args:
      source: What the data was made from.
      error: What the iterator raised.
      pipe: Applied to each example examined; None only decodes.
      indices: Examples to examine first, e.g. `order.train_indices` of the steps that failed.
      max_examples: How many further ones to examine, in the source's order.

    Returns:
      The file or example, what is wrong with it and what to do, or None if none was found.
    """
    if not isinstance(error, tf.errors.OpError):
        return None
    damage = source.find_damage()
    if damage is not None or not source.indexable:
        return damage and f"{damage}; prepare or copy it again"
    count = min(max_examples, source.num_examples)
    candidates = list(dict.fromkeys([*(int(i) for i in indices), *range(count)]))
    with futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(candidates), 256):  # in parts, to stop at the first found
            part = candidates[start : start + 256]
            problems = pool.map(lambda i: _problem(source, pipe, i), part)
            for index, problem in zip(part, problems, strict=True):
                if problem:
                    where = source.describe(index)
                    return f"{where} cannot be read: {problem}; replace it or remove it"
    return None


def _problem(source: Source, pipe: Pipe | None, index: int) -> str | None:
    """Returns why example `index` cannot be preprocessed, None if it can."""
    with tf.device("CPU:0"):
        number = tf.constant(index, tf.int64)
        place = {"index": number, "epoch": tf.zeros_like(number), "seed": tf.zeros((2,), tf.int32)}
        try:
            example = {**source.read(number), **place}
            if pipe is not None:
                pipe.host(example)
            elif source.encoded:
                tf.io.decode_image(example["image"], expand_animations=False)
        except (tf.errors.OpError, ValueError) as error:
            text = error.message if isinstance(error, tf.errors.OpError) else str(error)
            return re.sub(r"{{.*?}}\s*|\s*\[Op:.*", "", text)
    return None


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


def _chunk(share: int) -> int:
    """Returns how many examples are handled at a time: a divisor of a replica's batch."""
    return max(n for n in range(1, MAX_CHUNK + 1) if share % n == 0)


def _parallel(num_threads: int | None) -> int:
    return tf.data.AUTOTUNE if num_threads is None else num_threads


def _positions(
    batch_size: int, share: int, first: int, local: range, num_steps: int | None = None
) -> tf.data.Dataset:
    """Yields the (chunk,) int64 positions of this host, one replica's batch after the other."""
    chunk = _chunk(share)
    chunks_per_step = share // chunk * len(local)

    def of_element(i: tf.Tensor) -> tf.Tensor:
        # A host's replicas are neighbours, so its examples of one step are too.
        start = local.start * share + i % chunks_per_step * chunk
        step = i // chunks_per_step
        return first + step * batch_size + start + tf.range(chunk, dtype=tf.int64)

    ds = tf.data.Dataset.counter()
    if num_steps is not None:
        ds = ds.take(num_steps * chunks_per_step)
    return ds.map(of_element)


def _is_local(position: tf.Tensor, batch_size: int, share: int, local: range) -> tf.Tensor:
    replica = position % batch_size // share
    return (replica >= local.start) & (replica < local.stop)


def _train_records(source: Source, positions: tf.Tensor, seed: int) -> dict[str, tf.Tensor]:
    epoch, index = order.make_order(positions, num_examples=source.num_examples, seed=seed)
    seeds = order.example_seeds(epoch, index, seed=seed)
    return {**source.fetch(index), "index": index, "epoch": epoch, "seed": seeds}


def _eval_records(source: Source, positions: tf.Tensor) -> dict[str, tf.Tensor]:
    index = tf.minimum(positions, source.num_examples - 1)
    return _eval_place(source, positions, {**source.fetch(index), "index": index})


def _eval_place(source: Source, positions: tf.Tensor, records: dict) -> dict[str, tf.Tensor]:
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


def _placed(source: Source, positions: tf.Tensor, records: dict, seed: int) -> dict:
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
    prefetch: int,
) -> tf.data.Dataset:
    """Turns chunks of records into batches of `share` examples, as `spec` says each is."""

    def make_example(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        place = {key: value for key, value in record.items() if key in (*POSITION_SPEC, "mask")}
        own = {key: value for key, value in record.items() if key not in place}
        mask = {"mask": place.pop("mask")} if "mask" in place else {}
        return {**pipe.host_each({**source.decode_record(own), **place}), **mask}

    def make_chunk(chunk: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        each = {**spec, "seed": POSITION_SPEC["seed"]} if pipe.last else spec
        examples = tf.map_fn(make_example, chunk, parallel_iterations=1, fn_output_signature=each)
        return pipe.host_chunk(examples)

    def join(chunks: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {key: tf.reshape(chunks[key], (share, *spec[key].shape)) for key in spec}

    ds = records.map(make_chunk, _parallel(num_threads))
    ds = ds.batch(share // _chunk(share), drop_remainder=True).map(join).prefetch(prefetch)
    options = tf.data.Options()
    options.deterministic = True
    # Each host reads its own share already.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    if num_threads is not None:
        options.threading.private_threadpool_size = num_threads
    return ds.with_options(options)
