"""The batches of a run, distributed over its devices, from its options and opened data."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist.cluster.hosts import host_replicas, remote_hosts, replicas_of
from vit_dist.config.errors import DataError
from vit_dist.data.damage import message_of
from vit_dist.data.ops.pipe import Pipe
from vit_dist.data.pipeline import ALL, Part, make_eval_data, make_train_data
from vit_dist.data.service import from_services
from vit_dist.data.sources.source import Source
from vit_dist.data.view import batch_images
from vit_dist.inspection.sheet import Cell, describe_label
from vit_dist.run.options import Data, EvaluationOptions, RunOptions


def train_data(
    options: RunOptions, data: Data, strategy: tf.distribute.Strategy, *, first_step: int
) -> Any:
    """The distributed training set, endless, from the batch of `first_step` on."""
    make = functools.partial(_train_dataset, options, data, strategy, first_step=first_step)

    # Called once for each host that this process feeds, with that host's device as the default one.
    def of_host(context: tf.distribute.InputContext) -> tf.data.Dataset:
        local = replicas_of(context)
        # An element of the data set is one replica's batch, the option is in batches of all.
        prefetch = options.input.prefetch * len(local)
        if not options.input.services:
            return make(local=local, prefetch=prefetch)
        # Each service makes every n-th element of the data set that this host would make alone.
        return from_services(
            lambda part: make(local=local, prefetch=1, part=part),
            options.input.services,
            timeout=options.input.service_timeout,
            prefetch=prefetch,
        )

    # "from_function", because TensorFlow would otherwise shard the data set among the hosts. Each
    # host's data set holds only the examples of its own replicas already.
    return strategy.distribute_datasets_from_function(of_host)


def first_images(
    options: RunOptions,
    data: Data,
    strategy: tf.distribute.Strategy,
    *,
    first_step: int,
    count: int = 16,
) -> list[Cell]:
    """The first images of a step's batch on this host as the model sees them, with their classes.

    Returns:
      Cells of a sheet, `count` or as many as the first replica has, each with a uint8 (H, W, 3)
      image.

    Raises:
      tf.errors.OpError: an image cannot be read; run/explain.py finds which.
    """
    source, mixing, only = data.sources["train"], options.input.mixing, count
    # An image is mixed with others of its group, so whole groups are needed: -(-a // b) rounds up.
    if mixing is not None:
        only = -(-count // mixing.group_size) * mixing.group_size
    make = functools.partial(_train_dataset, options, data, strategy, first_step=first_step)
    dataset = make(local=host_replicas(strategy), prefetch=1, only=only)
    # On the CPU: a look at 16 images must not compile anything for an accelerator.
    with tf.device("CPU:0"):
        batch = next(iter(dataset))
        images, labels = batch_images(
            options.input.pipe, batch, mixing, num_classes=source.num_classes
        )
    captions = [describe_label(label, source.class_names) for label in labels]
    # An image that could not be read is black and has mask 0: it is not trained on.
    if "mask" in batch:
        readable = batch["mask"].numpy() > 0
        captions = [c if ok else "unreadable" for c, ok in zip(captions, readable, strict=True)]
    return [Cell(*pair) for pair in zip(images, captions, strict=True)][:count]


def images_to_inspect(options: EvaluationOptions, data: Data, *, count: int = 8) -> np.ndarray:
    """Some images as the evaluation's pipe prepares them: of val, or of train without val.

    Returns:
      uint8 (n, height, width, C): examples spread evenly over the split, because a folder's come
      class by class; of a source that can only be streamed the first. Unreadable ones are left out.

    Raises:
      DataError: none can be read.
    """
    source = data.sources.get("val", data.sources["train"])
    last = source.num_examples - 1 if source.indexable else count - 1
    indices = np.unique(np.linspace(0, last, count).astype(np.int64))
    return np.stack(list(read_images(source, options.pipe, indices).values()))


def read_images(source: Source, pipe: Pipe, indices: Sequence[int]) -> dict[int, np.ndarray]:
    """Some images of a source as a pipe without random ops prepares them.

    Args:
      source: prepared here, if it has not been.
      pipe: its part on the host makes the images.
      indices: places in the source, rising. A source that can only be streamed is read up to the
        last of them.

    Returns:
      Place -> uint8 (height, width, C), without the images that cannot be read.

    Raises:
      DataError: none can be read.
    """
    source.prepare()
    wanted = [int(i) for i in indices]
    if source.indexable:
        examples = ((i, source.read(tf.constant(i, tf.int64))) for i in wanted)
    else:
        stream, places = source.stream(seed=None, epoch=0).take(wanted[-1] + 1), set(wanted)
        examples = ((i, source.decode_record(r)) for i, r in enumerate(stream) if i in places)
    images, problem = {}, ""
    for index, example in examples:
        # The seed is of no effect in a pipe without random ops.
        place = {"index": tf.constant(index, tf.int64), "epoch": tf.constant(0, tf.int64)}
        place["seed"] = tf.constant([0, index])
        try:
            images[index] = pipe.host({**example, **place})["image"].numpy()
        except tf.errors.InvalidArgumentError as error:
            problem = message_of(error)
    if not images:
        raise DataError(f"no image of {source} can be read: {problem}")
    return images


def _train_dataset(
    options: RunOptions,
    data: Data,
    strategy: tf.distribute.Strategy,
    *,
    first_step: int,
    local: range,
    prefetch: int,
    part: Part = ALL,
    only: int | None = None,
) -> tf.data.Dataset:
    return make_train_data(
        data.sources["train"],
        options.input.pipe,
        batch_size=options.input.batch_size,
        seed=options.seed,
        first_step=first_step,
        num_replicas=strategy.num_replicas_in_sync,
        local_replicas=local,
        num_threads=options.input.num_threads,
        prefetch=prefetch,
        mixing=options.input.mixing,
        repeats=options.input.repeats,
        damage=data.damage.get("train"),
        part=part,
        only=only,
        labels_sum_to_one=options.evaluation.labels_sum_to_one,
    )


def eval_data(
    options: EvaluationOptions, data: Data, strategy: tf.distribute.Strategy, split: str
) -> Any:
    """A distributed evaluation set: each example once, padding masked."""
    source, replicas = data.sources[split], strategy.num_replicas_in_sync
    batch_size = eval_batch_size(options, source, replicas)
    endless = bool(remote_hosts(strategy))

    def of_host(context: tf.distribute.InputContext) -> tf.data.Dataset:
        dataset = make_eval_data(
            source,
            options.pipe,
            batch_size=batch_size,
            num_replicas=replicas,
            local_replicas=replicas_of(context),
            num_threads=options.num_threads,
            damage=data.damage.get(split),
            labels_sum_to_one=options.labels_sum_to_one,
        )
        return dataset.repeat() if endless else dataset

    distributed = strategy.distribute_datasets_from_function(of_host)
    if not endless:
        return distributed
    # The end of a data set on another host is an error there, which TensorFlow passes on to all
    # that it does on that host later. So the end is not reached: the batches are counted here.
    return _First(distributed, -(-source.num_examples // batch_size))


def eval_batch_size(options: EvaluationOptions, source: Source, num_replicas: int) -> int:
    """Images of a global batch of an evaluation, the last of which is padded with masked examples.

    A split smaller than the config's batch takes one batch, no larger than it needs, rounded up to
    a multiple of the replicas.
    """
    needed = min(options.batch_size, source.num_examples)
    return -(-needed // num_replicas) * num_replicas


class _First:
    """The first elements of an endless distributed data set, at each iteration anew."""

    def __init__(self, dataset: Any, count: int):
        self._dataset, self._count = dataset, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._dataset), self._count)
