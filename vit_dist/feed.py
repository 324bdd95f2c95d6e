"""From a checked config to the batches of a run, and what to say when reading them fails."""

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from vit_dist.data.base import Source
from vit_dist.data.cache import FORMS, CachedSource
from vit_dist.data.damage import POLICIES, explain_data_error
from vit_dist.data.pipeline import ALL, Part, make_eval_data, make_train_data, train_indices
from vit_dist.data.service import find_failure, from_services, parse_addresses
from vit_dist.data.sources import open_source
from vit_dist.data.view import batch_images
from vit_dist.strategy import host_replicas, num_hosts

if TYPE_CHECKING:
    from vit_dist.wiring import Run

_SPLITS = ("train", "val", "test")


def check_input(config: ConfigDict) -> None:
    """Checks config.input but for the pipes; opens nothing.

    Raises:
      ValueError: the first mistake.
    """
    section = config.input
    for key in ("batch_size", "eval_batch_size", "prefetch", "repeats"):
        if section[key] < 1:
            raise ValueError(f"config.input.{key} must be 1 or more, got {section[key]}")
    if section.num_threads is not None and section.num_threads < 1:
        raise ValueError("config.input.num_threads must be 1 or more, or None for all cores")
    if not 0 <= section.max_bad_share <= 1:
        raise ValueError(
            f"config.input.max_bad_share must be in [0, 1], got {section.max_bad_share}"
        )
    for key, allowed in (("on_bad_example", POLICIES), ("cache", ("off", *FORMS))):
        if section[key] not in allowed:
            raise ValueError(
                f"config.input.{key} {section[key]!r} is unknown; allowed: {', '.join(allowed)}"
            )
    try:
        addresses = parse_addresses(section.service)
    except ValueError as error:
        raise ValueError(f"config.input.service={section.service!r}: {error}") from None
    if addresses and section.on_bad_example == "mask":
        raise ValueError(
            "config.input.service does not go with config.input.on_bad_example='mask', whose count "
            "is kept in this process: set it to 'fail', or leave the service out"
        )
    if section.service_timeout <= 0:
        raise ValueError(
            f"config.input.service_timeout must be above 0, got {section.service_timeout}"
        )


def open_sources(config: ConfigDict) -> dict[str, Source]:
    """Opens the splits that the config names, the training split with its cache.

    Raises:
      ValueError: a split that is not there, or sets of classes that differ.
    """
    options = {k: v for k, v in config.data.items() if not k.endswith("_split") and k != "source"}
    splits = {s: config.data[f"{s}_split"] for s in _SPLITS if config.data[f"{s}_split"]}
    if "train" not in splits:
        raise ValueError("config.data.train_split must name a split")
    if config.data.source == "folder" and config.input.on_bad_example == "mask":
        options["check_files"] = False  # what is no image is masked when it is met
    sources = {k: open_source(config.data.source, split=v, **options) for k, v in splits.items()}
    if config.input.cache != "off":
        sources["train"] = CachedSource(
            sources["train"],
            config.input.cache,
            folder=config.input.cache_dir or None,
            keep_damaged=config.input.on_bad_example == "mask",
        )
    if config.input.service and not sources["train"].portable:
        raise ValueError(
            f"config.input.service cannot read {sources['train']}"
            + (" from config.input.cache" if config.input.cache != "off" else "")
            + ": that calls Python in this process. It takes demo, folder, synthetic, tfrecord, "
            "TFDS sets prepared as tfrecord and mixtures of these, with config.input.cache='off'"
        )
    for name, source in sources.items():
        if source.num_classes != sources["train"].num_classes:
            raise ValueError(
                f"split {name!r} has {source.num_classes} classes, "
                f"train has {sources['train'].num_classes}"
            )
    return sources


def train_data(run: "Run", strategy: tf.distribute.Strategy, *, first_step: int) -> Any:
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
    run: "Run", strategy: tf.distribute.Strategy, *, first_step: int, count: int = 16
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
    run: "Run",
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


def eval_data(run: "Run", strategy: tf.distribute.Strategy, split: str) -> Any:
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


def _eval_batch(run: "Run", split: str, replicas: int) -> int:
    needed = min(run.config.input.eval_batch_size, run.sources[split].num_examples)
    return -(-needed // replicas) * replicas


def explain_error(
    error: Exception,
    run: "Run",
    strategy: tf.distribute.Strategy,
    *,
    split: str,
    steps: range = range(0),
) -> Exception | None:
    """What to raise in place of a TensorFlow error: the damaged example, or the lost worker.

    Args:
      error: what running or reading raised.
      run: the checked config.
      strategy: what it ran on.
      split: what was being read.
      steps: of the training data, those that may have been read.

    Returns:
      None where nothing better can be said.
    """
    lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
    if num_hosts(strategy) > 1 and isinstance(error, (*lost, tf.errors.CancelledError)):
        found = re.search(r"Collective (?:ops is|has)[^\n]*", error.message)
        what = found[0] if found else type(error).__name__
        return ConnectionError(
            "lost another worker; its own log says why. Start all of them again: they go on from "
            f"the newest checkpoint. ({what[:300]})"
        )
    ours = (tf.errors.ResourceExhaustedError, tf.errors.InternalError)  # not for want of good data
    if not isinstance(error, tf.errors.OpError) or isinstance(error, ours):
        return None
    failed = find_failure(error)
    if isinstance(failed, ConnectionError):
        return failed
    source = run.sources[split]
    indices: Sequence[int] = ()
    if source.indexable and steps:
        indices = train_indices(
            source,
            batch_size=run.batch_size,
            seed=run.config.seed,
            first_step=steps.start,
            num_steps=len(steps),
            repeats=run.config.input.repeats,
        ).tolist()
    pipe = run.train_pipe if split == "train" else run.eval_pipe
    reason = explain_data_error(source, error, pipe=pipe, indices=indices)
    if reason is None and failed is not None:  # it is the service's own trouble
        return ValueError(f"{failed}. The data must be readable there under the same paths")
    return None if reason is None else ValueError(reason)
