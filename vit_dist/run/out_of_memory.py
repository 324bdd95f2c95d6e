"""What to say when a command does not fit into the memory of its device or host."""

import tensorflow as tf

from vit_dist.config.errors import UserError
from vit_dist.storage.errors import Kind, cause, kind_of

# What TensorFlow's allocators, XLA and CUDA say, under several codes.
_WORDS = ("OOM when allocating", "Out of memory", "out of memory", "OUT_OF_MEMORY")

# Keys of the config, the least costly first: the same step in smaller parts, then other numerics.
TRAINING = (
    "double config.step.accumulation (the same step in smaller parts), or set "
    "--config.precision=bfloat16, --config.model.remat=full, a smaller config.input.batch_size or "
    "a smaller model; where an evaluation fails, a smaller config.input.eval_batch_size; where the "
    "host's memory is short, --config.input.cache=off or a config.input.cache_dir, and less "
    "config.input.prefetch"
)
EVALUATION = "set a smaller config.input.eval_batch_size, or --config.precision=bfloat16"
OTHER = "use a machine with more memory, or close other programs"


class OutOfMemoryError(UserError):
    """Memory was short, of the device or the host; the message says what to change.

    The process is to end at once after it: TensorFlow 2.21 aborts when it frees what a step without
    memory was to change (seen on an H200), and a supervisor would take that for a crash.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, of the device or the host."""
    if isinstance(error, (MemoryError, OutOfMemoryError)):
        return True
    # First, because a full disk or a quota comes with the same code, RESOURCE_EXHAUSTED.
    kind = kind_of(error)
    if kind is not None:
        return kind is Kind.NO_MEMORY
    if not isinstance(error, tf.errors.OpError):
        return False
    exhausted = isinstance(error, tf.errors.ResourceExhaustedError)
    return exhausted or any(words in (error.message or "") for words in _WORDS)


def explain_memory(error: BaseException, *, remedy: str) -> OutOfMemoryError | None:
    """The error to raise instead; None where memory was not short.

    Args:
      error: what was raised.
      remedy: TRAINING, EVALUATION or OTHER, by what the command can be told.
    """
    if not is_out_of_memory(error):
        return None
    return OutOfMemoryError(f"out of memory ({cause(error)}): {remedy}")
