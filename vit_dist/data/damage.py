"""Examples that cannot be read: naming them, or giving them no weight and counting them.

TensorFlow's graphs cannot catch an error. So under the policy "mask" a chunk of examples is made
inside one Python call, and only if that fails each of them alone: undamaged data costs one call for
a chunk, and a damaged example keeps its place in the batch.
"""

import collections
import re
import threading
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf
from absl import logging

from vit_dist.data.ops.decoding import decode_whole
from vit_dist.data.ops.pipe import POSITION_SPEC, Pipe
from vit_dist.data.sources.records import ENDED
from vit_dist.data.sources.source import CORRUPT, MISSING, Source

POLICIES = ("fail", "mask")
MAX_EXAMINED = 20_000  # a minute or two of decoding on a small machine
MAX_NAMED = 100  # damaged examples that are named in the log, so that a long run does not flood it

# What the data can be blamed for; a network or a memory that fails would be masked wrongly.
DATA_ERRORS = (
    tf.errors.NotFoundError,
    tf.errors.InvalidArgumentError,
    tf.errors.DataLossError,
    ValueError,
)

Tensors = dict[str, tf.Tensor]


class Damage:
    """Counts the masked examples of this host by reason, and names each once in the log."""

    def __init__(self, source: Source):
        self._source = source
        self._lock = threading.Lock()
        self._reasons: collections.Counter[str] = collections.Counter()
        self._seen: set[int] = set()

    def add(self, index: int, error: Exception) -> None:
        """Counts one example; the pipeline calls this from its threads."""
        reason = reason_of(error)
        with self._lock:
            self._reasons[reason] += 1
            new = index not in self._seen and len(self._seen) < MAX_NAMED
            self._seen.add(index)
        if new:
            where = self._source.describe(index)
            logging.warning("masked: %s is %s (%s)", where, reason, message_of(error))

    def counts(self) -> dict[str, int]:
        """Returns reason -> how many examples were masked so far."""
        with self._lock:
            return dict(self._reasons)


def check_share(masked: int, *, seen: int, num_examples: int, limit: float) -> None:
    """Raises ValueError where more than `limit` of the data seen (an epoch at least) was masked."""
    if masked > limit * max(seen, num_examples):
        raise ValueError(
            f"{masked} damaged examples were masked, more than config.input.max_bad_share "
            f"({limit:g}) of {max(seen, num_examples):,}: mend the data (the log names the first "
            f"{MAX_NAMED}), or raise that share"
        )


def masking(
    make_chunk: Callable[[Tensors], Tensors],
    inputs: dict[str, tf.TensorSpec],
    outputs: dict[str, tf.TensorSpec],
    damage: Damage,
) -> Callable[[Tensors], Tensors]:
    """Wraps make_chunk: examples that fail become zeros with a "mask" of 0.

    Args:
      make_chunk: n records -> n examples; each entry of both has a leading axis.
      inputs: Spec of a chunk of records, with "index".
      outputs: Spec of one example, with "mask".
      damage: Is told of each example that fails.
    """
    with tf.init_scope(), tf.device("CPU:0"):
        function = tf.function(make_chunk, autograph=False)
        size = inputs["index"].shape[0]
        whole, single = (
            function.get_concrete_function(
                {k: tf.TensorSpec((n, *s.shape[1:]), s.dtype, k) for k, s in inputs.items()}
            )
            for n in (size, 1)
        )

    def call(concrete, chunk: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with tf.device("CPU:0"):
            made = concrete(**{k: tf.constant(v, inputs[k].dtype) for k, v in chunk.items()})
        return {k: v.numpy() for k, v in made.items()}

    def one(chunk: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return call(single, chunk)
        except DATA_ERRORS as error:
            damage.add(int(chunk["index"][0]), error)
            empty = {k: b"" if s.dtype == tf.string else 0 for k, s in outputs.items()}
            zeros = {
                k: np.full((1, *s.shape), empty[k], s.dtype.as_numpy_dtype)
                for k, s in outputs.items()
            }
            return {**zeros, **{k: chunk[k] for k in POSITION_SPEC if k in outputs}}

    def attempt(*values: np.ndarray) -> list[np.ndarray]:
        chunk = dict(zip(inputs, values, strict=True))
        try:
            made = call(whole, chunk)
        except DATA_ERRORS:
            ones = [one({k: v[i : i + 1] for k, v in chunk.items()}) for i in range(size)]
            made = {k: np.concatenate([example[k] for example in ones]) for k in outputs}
        return [made[k] for k in outputs]

    def guarded(chunk: Tensors) -> Tensors:
        made = tf.numpy_function(
            attempt, [chunk[k] for k in inputs], [s.dtype for s in outputs.values()], stateful=False
        )
        return {
            k: tf.ensure_shape(v, (size, *outputs[k].shape))
            for k, v in zip(outputs, made, strict=True)
        }

    return guarded


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
      indices: Examples to examine first, e.g. `pipeline.train_indices` of the steps that failed.
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


def reason_of(error: Exception) -> str:
    """Returns "missing", "corrupt" (how it is stored) or "undecodable" (what is stored)."""
    if isinstance(error, tf.errors.NotFoundError) or MISSING in str(error):
        return "missing"
    if isinstance(error, tf.errors.DataLossError) or CORRUPT in str(error) or ENDED in str(error):
        return "corrupt"
    return "undecodable"


def message_of(error: Exception) -> str:
    """Returns the one line of TensorFlow's message that says what is wrong."""
    text = (error.message if isinstance(error, tf.errors.OpError) else None) or str(error)
    text = re.sub(r"{{.*?}}\s*|\s*\[Op:.*|\s*\[\[.*", "", text)  # names of nodes
    around = (" ", "\t", "<stack traces", "Detected at node", "Graph execution error")
    lines = [x for x in text.split("\n") if x.strip() and not x.startswith(around)]
    text = re.sub(r"^\w+Error: ", "", lines[0]) if lines else type(error).__name__
    return text.replace(ENDED, "the file ends before it")


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
                decode_whole(example["image"])
        except (tf.errors.OpError, ValueError) as error:
            return message_of(error)
    return None
