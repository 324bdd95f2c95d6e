"""Examples that cannot be used: naming them, or giving them no weight and counting them.

TensorFlow's graphs cannot catch an error. So under the policy "mask" a chunk of examples is made
inside one Python call, and only if that fails each of them alone: undamaged data costs one call for
a chunk, and a damaged example keeps its place in the batch.
"""

import collections
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf
from absl import logging

from vit_dist.config.errors import DataError
from vit_dist.data.ops.decoding import decode_whole
from vit_dist.data.ops.pipe import POSITION_SPEC, Pipe
from vit_dist.data.sources import labels
from vit_dist.data.sources.records import ENDED
from vit_dist.data.sources.source import CORRUPT, MISSING, Source
from vit_dist.storage.errors import is_failing

POLICIES = ("fail", "mask")
MAX_EXAMINED = 20_000  # a minute or two of decoding on a small machine
MAX_SECONDS = 60.0  # of looking for further damaged examples, once one is found
MAX_NAMED = 100  # damaged examples that are named, so that a long run does not flood its log
MIN_BAD = 2  # examples of an epoch that may be masked whatever share of a small set they are

# The key of a record that holds its position in the run; `Damage` counts by it.
POSITION = "position"

# Errors that the data is to blame for. Others, such as a network that fails or memory that runs
# out, must stop the run: masking would hide them.
DATA_ERRORS = (
    tf.errors.NotFoundError,
    tf.errors.InvalidArgumentError,
    tf.errors.DataLossError,
    ValueError,
)

Tensors = dict[str, tf.Tensor]


class Damage:
    """Counts the masked examples of this host by reason, and names each once in the log.

    Args:
      source: Where the examples are read.
      max_share: The largest share of an epoch that may be masked; see `check_share`.
    """

    def __init__(self, source: Source, *, max_share: float = 1.0):
        self._source, self._max_share = source, max_share
        self._lock = threading.Lock()
        # Keyed by position, so that each example is counted once, although the first batch is made
        # a second time for a preview.
        self._reasons: dict[int, str] = {}
        # Numbers of the examples that the log has named; a damaged one is masked again in each
        # epoch.
        self._seen: set[int] = set()
        # (label, number of the example) of the first one that is masked for its label.
        self._label: tuple[int, int] | None = None

    def add(self, position: int, index: int, error: Exception) -> None:
        """Notes that the example at a position was masked; pipelines call this from threads.

        Args:
          position: In the run, or in the split for evaluation.
          index: The example's number.
          error: Why it cannot be used.
        """
        reason = reason_of(error)
        with self._lock:
            self._reasons[position] = reason
            self._label = self._label or labels.find(str(error))
            # Checked and noted under one lock: two threads may meet the same example.
            new = index not in self._seen and len(self._seen) < MAX_NAMED
            self._seen.add(index)
        if new:
            where = self._source.describe(index)
            logging.warning("masked: %s is %s (%s)", where, reason, message_of(error))

    def counts(self, before: int | None = None) -> dict[str, int]:
        """Returns reason -> how many examples were masked, at positions below `before` or all.

        The pipeline runs ahead of training: what a run has trained on so far is at positions below
        its number of steps times the global batch size.
        """
        with self._lock:
            # Counted under the lock, because the pipeline's threads go on adding.
            return dict(
                collections.Counter(
                    reason
                    for position, reason in self._reasons.items()
                    if before is None or position < before
                )
            )

    def check_share(self, masked: int, *, seen: int, first: int = 0, repeats: int = 1) -> None:
        """Calls the function `check_share` with the size of this source and this limit.

        Raises:
          DataError: Too many were masked; says what their labels suggest, if some are wrong.
        """
        try:
            check_share(
                masked,
                seen=seen,
                first=first,
                num_examples=self._source.num_examples,
                limit=self._max_share,
                repeats=repeats,
            )
        except DataError as error:
            if self._label is None:
                raise
            raise DataError(f"{error}. {_explain_label(self._source, *self._label)}") from None


def check_share(
    masked: int,
    *,
    seen: int,
    num_examples: int,
    limit: float,
    first: int = 0,
    repeats: int = 1,
) -> None:
    """Ends a run that masks too much of its data.

    Args:
      masked: How many examples have been masked, on all hosts.
      seen: How many examples have been read, masked or not.
      num_examples: Of the source.
      limit: The largest share of an epoch's examples, for each epoch begun. In a small set MIN_BAD
        of them are allowed even so, unless the limit is 0.
      first: The position in the run of the first of them, which a resume may put within an epoch.
      repeats: How often each example stands in its batch.

    Raises:
      DataError: More have been masked.
    """
    # A bad example may come early in its epoch, so each epoch that has begun counts as a whole one.
    size = num_examples * repeats
    epochs = max(-(-(first + seen) // size) - first // size, 1)  # begun, or gone on with
    each = max(limit * num_examples, MIN_BAD if limit else 0)
    if masked > each * repeats * epochs:
        raise DataError(
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
      inputs: Spec of a chunk of records, with "index" and POSITION.
      outputs: Spec of one example, with "mask".
      damage: Is told of each example that fails.
    """
    with tf.init_scope(), tf.device("CPU:0"):
        # Traced here, for a whole chunk and for one example: in the threads of tf.data, tracing
        # would race with that of the training step.
        function = tf.function(make_chunk, autograph=False)
        # Every chunk has as many records (pipeline._chunk), so two traces are enough.
        size = inputs["index"].shape[0]
        whole, single = (
            function.get_concrete_function(
                {k: tf.TensorSpec((n, *s.shape[1:]), s.dtype, k) for k, s in inputs.items()}
            )
            for n in (size, 1)
        )

    # tf.data calls this from its own threads, in which no device is chosen yet.
    def call(concrete, chunk: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with tf.device("CPU:0"):
            # With the dtype named: strings arrive as numpy arrays of objects, which do not tell it.
            made = concrete(**{k: tf.constant(v, inputs[k].dtype) for k, v in chunk.items()})
        return {k: v.numpy() for k, v in made.items()}

    def one(chunk: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return call(single, chunk)
        except DATA_ERRORS as error:
            # Padding of an evaluation repeats an example, which counts where it stands itself.
            if chunk.get("mask", np.ones(1))[0]:
                damage.add(int(chunk[POSITION][0]), int(chunk["index"][0]), error)
            # The example becomes zeros, and empty strings where the pipe keeps strings such as
            # paths.
            empty = {k: b"" if s.dtype == tf.string else 0 for k, s in outputs.items()}
            zeros = {
                k: np.full((1, *s.shape), empty[k], s.dtype.as_numpy_dtype)
                for k, s in outputs.items()
            }
            # Number, epoch and seed are known also of an example that cannot be read.
            return {**zeros, **{k: chunk[k] for k in POSITION_SPEC if k in outputs}}

    def attempt(*values: np.ndarray) -> list[np.ndarray]:
        chunk = dict(zip(inputs, values, strict=True))
        try:
            made = call(whole, chunk)
        except DATA_ERRORS:
            # The error does not say which example of the chunk failed, so each is made once more,
            # alone.
            ones = [one({k: v[i : i + 1] for k, v in chunk.items()}) for i in range(size)]
            made = {k: np.concatenate([example[k] for example in ones]) for k in outputs}
        return [made[k] for k in outputs]

    def guarded(chunk: Tensors) -> Tensors:
        # Not stateful: the result depends on the inputs alone, so tf.data may call it in parallel.
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
    """Finds which examples make the data fail, as TensorFlow's own error does not name them.

    Args:
      source: What the data was made from.
      error: What the iterator raised.
      pipe: Applied to each example examined; None only decodes.
      indices: Examples to examine first, e.g. `pipeline.train_indices` of the steps that failed.
      max_examples: How many further ones to examine, in the source's order: so that all that is
        damaged is named at once, and not one file at each start.

    Returns:
      The files or examples, what is wrong with them and what to do, or None if none was found.
    """
    if not isinstance(error, tf.errors.OpError):
        return None
    # The check of labels names its example in the message: there is nothing to look for.
    found = labels.find(error.message or "")
    if found is not None:
        text = _explain_label(source, *found)
        return f"{text}, or set config.input.on_bad_example=mask to leave it out"
    shares = labels.find_shares(error.message or "")
    if shares is not None:
        return (
            f"{source.describe(shares[1])}: {shares[0]}; correct it, take a loss for several "
            "classes (config.loss.name=sigmoid), or set config.input.on_bad_example=mask to leave "
            "it out"
        )
    # Storage that was cut damages many examples at once; the source names the file.
    damage = source.find_damage()
    if damage is not None:
        return damage
    count = min(max_examples, source.num_examples)
    if source.indexable:
        # The examples that were being read when it failed come first; each is looked at once.
        candidates = list(dict.fromkeys([*(int(i) for i in indices), *range(count)]))
        lines = _damaged(source, _problems_by_index(source, pipe, candidates))
    else:
        lines = _damaged(source, _problems_of_stream(source, pipe, count))
    if len(lines) < 2:
        return f"{lines[0]}; replace it or remove it" if lines else None
    shown = "".join(f"\n  {line}" for line in lines)
    return f"{len(lines)} examples are damaged; replace it or remove it, each of these:{shown}"


def _damaged(source: Source, problems: Iterable[tuple[int, str | None]]) -> list[str]:
    """Returns a line for each damaged example, until MAX_NAMED or MAX_SECONDS after the first."""
    lines: list[str] = []
    deadline = float("inf")
    for index, problem in problems:
        if problem:
            lines.append(f"{source.describe(index)} cannot be read: {problem}")
            deadline = min(deadline, time.monotonic() + MAX_SECONDS)
        # The first is found, so what is left is to spare the user further starts: within reason.
        if len(lines) >= MAX_NAMED or time.monotonic() > deadline:
            break
    return lines


def _problems_by_index(
    source: Source, pipe: Pipe | None, candidates: Sequence[int]
) -> Iterator[tuple[int, str | None]]:
    """Yields the numbers of examples, each with why it cannot be preprocessed."""

    def problem(index: int) -> str | None:
        return _problem(pipe, index, lambda: source.read(tf.constant(index, tf.int64)))

    with futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(candidates), 256):  # in parts, to stop between two of them
            part = candidates[start : start + 256]
            yield from zip(part, pool.map(problem, part), strict=True)


def _problems_of_stream(
    source: Source, pipe: Pipe | None, count: int
) -> Iterator[tuple[int, str | None]]:
    """Yields number and problem, as `_problems_by_index`, of a stream's first `count` examples."""
    with tf.device("CPU:0"):
        records = iter(source.stream(seed=None, epoch=0).take(count))
    for record in records:
        index = int(record.pop("index"))
        yield index, _problem(pipe, index, functools.partial(source.decode_record, record))


def _explain_label(source: Source, label: int, index: int) -> str:
    """Says which example has a label outside of the classes, and what other labels suggest."""
    others: list[int] = []
    if source.indexable:
        # Evenly spread; the step is rounded up, so that these are at most MAX_LABELS.
        indices = range(0, source.num_examples, -(-source.num_examples // labels.MAX_LABELS))
        # One label tells nothing about the others: whether all count from 1, say.
        looked = labels.look_at(lambda i: source.peek(i)[1], indices)
        others = [x for x in looked if x is not None]
    problem = labels.problem(label, source.num_classes) or f"{labels.OUTSIDE} {label}"
    wrong = sum(labels.problem(x, source.num_classes) is not None for x in others)
    share = f", as are {wrong} of the {len(others)} looked at" if wrong > 1 else ""
    advice = labels.advise(label, source.num_classes, first_label=source.first_label, others=others)
    return f"{source.describe(index)}: {problem}{share}. {advice}"


def reason_of(error: Exception) -> str:
    """Returns "missing", "corrupt" (how it is stored), "mislabelled", or "undecodable"."""
    text = str(error)
    # NotFoundError comes where TensorFlow reads the file. What Python reads fails with another
    # type, and with MISSING, CORRUPT or ENDED in its text.
    if isinstance(error, tf.errors.NotFoundError) or MISSING in text:
        return "missing"
    if isinstance(error, tf.errors.DataLossError) or CORRUPT in text or ENDED in text:
        return "corrupt"
    return "mislabelled" if labels.concerns(text) else "undecodable"


def message_of(error: Exception) -> str:
    """Returns the one line of TensorFlow's message that says what is wrong."""
    text = (error.message if isinstance(error, tf.errors.OpError) else None) or str(error)
    # Names of nodes go: "{{node a/b}} Invalid PNG data [[{{...}}]] [Op:IteratorGetNext]" becomes
    # "Invalid PNG data".
    text = re.sub(r"{{.*?}}\s*|\s*\[Op:.*|\s*\[\[.*", "", text)
    # Beginnings of lines that are headings or traceback; the first other line says what is wrong.
    around = (" ", "\t", "<stack traces", "Detected at node", "Graph execution error")
    lines = [x for x in text.split("\n") if x.strip() and not x.startswith(around)]
    text = re.sub(r"^\w+Error: ", "", lines[0]) if lines else type(error).__name__
    # A failed tf.debugging.Assert lists its values: "assertion failed: [its label is] [7] [...]".
    failed = re.search(r"assertion failed: \[(.*)\]", text)
    if failed:
        text = failed[1].replace("] [", " ")
    return text.replace(ENDED, "the file ends before it")


def _problem(pipe: Pipe | None, index: int, read: Callable[[], Tensors]) -> str | None:
    """Returns why the example that `read` reads cannot be preprocessed, None if it can."""
    with tf.device("CPU:0"):
        number = tf.constant(index, tf.int64)
        # Any seed will do: whether an image can be decoded does not depend on the augmentation.
        place = {"index": number, "epoch": tf.zeros_like(number), "seed": tf.zeros((2,), tf.int32)}
        try:
            example = {**read(), **place}
            if pipe is not None:
                pipe.host(example)
            elif example["image"].dtype == tf.string:
                decode_whole(example["image"])
        except (tf.errors.OpError, ValueError) as error:
            # What the storage cannot give now says nothing of the example.
            return None if is_failing(error) else message_of(error)
    return None
