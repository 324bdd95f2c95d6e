"""From a checked config to the batches of a run, and what to say when reading them fails."""

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist.cluster.hosts import host_replicas
from vit_dist.data.pipeline import ALL, Part, make_eval_data, make_train_data
from vit_dist.data.service import from_services, parse_addresses
from vit_dist.data.view import batch_images
from vit_dist.run.check import Run
from vit_dist.run.explain import explain_error


def train_data(run: Run, strategy: tf.distribute.Strategy, *, first_step: int) -> Any:
    """The distributed training set from the batch of `first_step` on."""
    local = host_replicas(strategy)
    prefetch = run.config.input.prefetch * len(local)
    make = functools.partial(_train_dataset, run, strategy, first_step=first_step)
    section = run.config.input
    if section.service:
        dataset = from_services(
            lambda part: make(prefetch=1, part=part),
            parse_addresses(section.service),
            timeout=run.config.input.service_timeout,
            prefetch=prefetch,
        )
    else:
        dataset = make(prefetch=prefetch)
    return strategy.distribute_datasets_from_function(lambda _: dataset)


def first_images(
    run: Run, strategy: tf.distribute.Strategy, *, first_step: int, count: int = 16
) -> np.ndarray:
    """The first images of a step's batch on this host as the model sees them, uint8 (B, H, W, 3).

    Raises:
      ValueError: they cannot be read; names the first that cannot.
    """
    if run.mixing is not None:  # partners are within a group
        count = -(-count // run.mixing.group_size) * run.mixing.group_size
    try:
        dataset = _train_dataset(run, strategy, first_step=first_step, prefetch=1, only=count)
        with tf.device("CPU:0"):
            return batch_images(run.train_pipe, next(iter(dataset)), run.mixing)
    except tf.errors.OpError as error:
        steps = range(first_step, first_step + 2)
        raise explain_error(error, run, strategy, split="train", steps=steps) or error from error


def _train_dataset(
    run: Run,
    strategy: tf.distribute.Strategy,
    *,
    first_step: int,
    prefetch: int,
    part: Part = ALL,
    only: int | None = None,
) -> tf.data.Dataset:
    return make_train_data(
        run.sources["train"],
        run.train_pipe,
        batch_size=run.batch_size,
        seed=run.config.seed,
        first_step=first_step,
        num_replicas=strategy.num_replicas_in_sync,
        local_replicas=host_replicas(strategy),
        num_threads=run.config.input.num_threads,
        prefetch=prefetch,
        mixing=run.mixing,
        repeats=run.config.input.repeats,
        damage=run.damage.get("train"),
        part=part,
        only=only,
    )


def eval_data(run: Run, strategy: tf.distribute.Strategy, split: str) -> Any:
    """A distributed evaluation set: each example once, padding masked."""
    replicas = strategy.num_replicas_in_sync
    dataset = make_eval_data(
        run.sources[split],
        run.eval_pipe,
        # At most one padded batch: a small split would be mostly padding otherwise.
        batch_size=_eval_batch(run, split, replicas),
        num_replicas=replicas,
        local_replicas=host_replicas(strategy),
        num_threads=run.config.input.num_threads,
        damage=run.damage.get(split),
    )
    return strategy.distribute_datasets_from_function(lambda _: dataset)


def _eval_batch(run: Run, split: str, replicas: int) -> int:
    needed = min(run.config.input.eval_batch_size, run.sources[split].num_examples)
    return -(-needed // replicas) * replicas
