"""What to say when a run fails: the damaged example, the lost host, the full disk.

TensorFlow's own errors name nodes of graphs. These functions return what to raise in their place,
or None where nothing better can be said: the error then keeps its traceback.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import tensorflow as tf

from vit_dist.cluster.hosts import num_hosts, remote_hosts
from vit_dist.config.errors import DataError, HostLostError, UserError
from vit_dist.data.damage import DATA_ERRORS, explain_data_error, message_of
from vit_dist.data.ops.pipe import Pipe
from vit_dist.data.service import find_failure
from vit_dist.run import out_of_memory
from vit_dist.run.options import Data
from vit_dist.storage import errors as storage_errors

# An error can be the data's fault only if a data iterator raised it: the message then names the
# iterator's node in the graph.
_ITERATOR = re.compile(r"Iterator\w*GetNext")
# TensorFlow names a host of a TPU slice by its device, with the host's number as the task.
_TASK = re.compile(r"/job:worker/replica:0/task:(\d+)")
# The errors by which the remaining hosts notice that a host is gone, whatever it died of.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
    tf.errors.CancelledError,
)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a run was reading when it failed.

    Attributes:
      split: "train", "val" or "test".
      pipe: the pipe that prepared the images.
      indices: called only after a failure; lists the examples that may have been read, to be looked
        at first.
    """

    split: str
    pipe: Pipe
    indices: Callable[[], Sequence[int]] = tuple


def explain(
    error: Exception,
    reading: Reading,
    data: Data,
    strategy: tf.distribute.Strategy,
    *,
    workdir: str,
    blame: Callable[[], str | None],
) -> UserError | None:
    """What to raise in place of an error that ended a run; see the module.

    Args:
      error: what ended the run.
      reading: what was being read then.
      data: the opened splits.
      strategy: the run's.
      workdir: the run's folder.
      blame: returns which host an error between hosts is due to; see Watchdog.lost.
    """
    if isinstance(error, UserError):
        return None
    out = out_of_memory.explain_memory(error, remedy=out_of_memory.TRAINING)
    if out is not None:
        return out
    # Before the data and the other hosts: a disk or bucket that fails while images are read is
    # neither a damaged example nor, though TensorFlow may use the same codes, a lost host. A file
    # of the data that is not there, or is damaged, is looked for and named with its example.
    if storage_errors.is_failing(error) or isinstance(error, OSError):
        return storage_errors.explain(
            error,
            place=workdir,
            note="Checkpoints are untouched",
            then="and run again to resume",
        )
    if not isinstance(error, tf.errors.OpError):
        return None
    # Before the iterators: on a TPU slice they run on other hosts, which may be gone.
    if remote_hosts(strategy):
        lost = explain_lost_host(error, blame)
        if lost is not None:
            return lost
    if _ITERATOR.search(error.message or ""):
        explained = explain_reading(error, reading, data)
        if explained is None and remote_hosts(strategy):
            return _explain_remote_reading(error)
        return explained
    if num_hosts(strategy) > 1 and isinstance(error, _LOST):
        return _explain_loss(error, blame())
    return None


def explain_reading(error: tf.errors.OpError, reading: Reading, data: Data) -> UserError | None:
    """The damaged example, or the data service that failed, behind what an iterator raised."""
    # Memory that ran out, a fault of TensorFlow's, or a host that is gone: not the data's.
    if isinstance(
        error,
        tf.errors.ResourceExhaustedError | tf.errors.InternalError | tf.errors.UnavailableError,
    ):
        return None
    # An evaluation's errors come here first. Whoever gets this one tells it as the storage's.
    if storage_errors.is_failing(error):
        return None
    failed = find_failure(error)
    if isinstance(failed, ConnectionError):
        return HostLostError(str(failed))
    # TensorFlow does not say which example failed: examples are decoded again, one by one, until
    # one fails. Those of a stream have no numbers.
    source = data.sources[reading.split]
    indices = reading.indices() if source.indexable else ()
    reason = explain_data_error(source, error, pipe=reading.pipe, indices=indices)
    if reason is not None:
        return DataError(reason)
    # Every example is readable in this process, so the service cannot read what this host can.
    if failed is not None:
        return DataError(f"{failed}. The data must be readable there under the same paths")
    return None


def _explain_remote_reading(error: tf.errors.OpError) -> DataError | None:
    """A host of a TPU slice cannot read what this process reads; None for other errors."""
    task = _TASK.search(error.message or "")
    if not isinstance(error, DATA_ERRORS):
        return None
    host = f"TPU host {task[1]}" if task else "a host of the TPU slice"
    return DataError(
        f"{host} cannot read what this process can: {message_of(error)}. The data must have the "
        "same path, and be the same, on every host: put it into a bucket"
    )


def explain_lost_host(
    error: tf.errors.OpError, blame: Callable[[], str | None]
) -> HostLostError | None:
    """What to raise in place of an error of TensorFlow's that a lost host of a TPU slice caused.

    Args:
      error: of any kind: what TensorFlow raises depends on what it was doing on the host.
      blame: returns which host is gone; see Slice.lost.
    """
    blamed = blame()
    return None if blamed is None else _explain_loss(error, blamed)


def _explain_loss(error: tf.errors.OpError, blamed: str | None) -> HostLostError:
    """An error in a collective: mostly because another host is gone."""
    found = re.search(r"Collective (?:ops is|has)[^\n]*", error.message)
    what = (found[0] if found else error.message.strip().splitlines()[0])[:300]
    again = "Start all of them again: they go on from the newest checkpoint"
    if blamed is not None:
        return HostLostError(f"lost another worker: {blamed}. {again}. ({what})")
    return HostLostError(f"the hosts lost each other, though all of them answer. {again}. ({what})")
