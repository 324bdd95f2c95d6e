"""What to say when a run fails: the damaged example, the lost worker, the full disk."""

import re
from collections.abc import Sequence

import tensorflow as tf

from vit_dist.cluster.hosts import num_hosts
from vit_dist.data.damage import explain_data_error
from vit_dist.data.pipeline import train_indices
from vit_dist.data.service import find_failure
from vit_dist.run.check import Run


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
