"""Which example stands at which position of a training run, and with which seed: pure functions."""

import functools

import tensorflow as tf

MAX_SEED = 2**62
# Rounds of the cipher by which an index is shuffled. tf.random.experimental.index_shuffle makes 4:
# too few. With 60,000 examples the orders of successive epochs then correlate by 0.9 (measured),
# and small seeds leave small sets almost in order. From 12 rounds on correlations, fixed points and
# neighbours are those of random permutations; 16 cost 0.4 us an example.
ROUNDS = 16


def make_order(
    positions: tf.Tensor, *, num_examples: int, seed: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the epoch and the index of the example at each position of a training run.

    Within an epoch the indices are a permutation of range(num_examples).

    Args:
      positions: (B,) int64.
      num_examples: Size of the source.
      seed: In [0, 2**62).

    Returns:
      Two (B,) int64.
    """
    size = tf.constant(num_examples, tf.int64)
    epoch, index = _make_order(positions, size, tf.constant(seed_words(seed), tf.int32))
    # What is called knows no number of positions.
    return tf.ensure_shape(epoch, positions.shape), tf.ensure_shape(index, positions.shape)


def repeat_in_batch(
    positions: tf.Tensor, *, batch_size: int, repeats: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Repeated augmentation (arXiv 1901.09335): each example stands `repeats` times in its batch.

    Copies lie batch_size / repeats (rounded up) apart, so that as in DeiT they go to different
    replicas, and no example is mixed with itself. Where `repeats` does not divide the batch, the
    last few examples of a batch have one copy less.

    Args:
      positions: (B,) int64, of the run.
      batch_size: Global.
      repeats: 1 or more; 1 leaves the positions as they are.

    Returns:
      The positions to read, and the number of the copy, from 0: (B,) int64 each.
    """
    distinct = -(-batch_size // repeats)  # examples of a batch
    step, place = positions // batch_size, positions % batch_size
    # Place 0, 1, ..., distinct - 1 of a batch hold first copies, the next `distinct` second copies.
    return step * distinct + place % distinct, place // distinct


def example_seeds(epoch: tf.Tensor, index: tf.Tensor, *, seed: int) -> tf.Tensor:
    """Returns fold_in(fold_in(seed, epoch), index) for (B,) int64 each, as (B, 2) int32."""
    made = _example_seeds(epoch, index, tf.constant(seed_words(seed), tf.int32))
    return tf.ensure_shape(made, (*index.shape, 2))


def seed_words(seed: int) -> tuple[int, int]:
    """Splits a seed in [0, 2**62) into the two int32 that TensorFlow's stateless ops take."""
    return seed % 2**31, seed // 2**31


_MANY = tf.TensorSpec((None,), tf.int64)
_WORDS = tf.TensorSpec((2,), tf.int32)  # of a seed
# A process makes a graph of each function once, whatever its numbers are: the loops in them would
# take every pipeline that is built a tenth of a second.
_once = functools.partial(tf.function, autograph=False)


@_once(input_signature=[_MANY, tf.TensorSpec((), tf.int64), _WORDS])
def _make_order(positions: tf.Tensor, num_examples: tf.Tensor, words: tf.Tensor):
    epoch, slot = positions // num_examples, positions % num_examples

    def key_of(one: tf.Tensor) -> tf.Tensor:
        # Augmentation folds the index of an example into the epoch's seed (example_seeds). No
        # example has the index -1, so these numbers are independent of augmentation.
        stream = tf.random.fold_in(_epoch_seed(one, words), -1)
        return tf.random.stateless_uniform((3,), stream, None, None, tf.uint32)

    index = tf.raw_ops.RandomIndexShuffle(
        index=slot,
        seed=_per_epoch(key_of, epoch, tf.TensorSpec((3,), tf.uint32)),
        max_index=tf.fill(tf.shape(slot), num_examples - 1),
        rounds=ROUNDS,
    )
    return epoch, index


@_once(input_signature=[_MANY, _MANY, _WORDS])
def _example_seeds(epoch: tf.Tensor, index: tf.Tensor, words: tf.Tensor) -> tf.Tensor:
    # TensorFlow's fold_in(s, x) is [a random number drawn from s, x]. That number is the same for
    # all examples of an epoch, so it is drawn once for each epoch and not for each example.
    def draw(one: tf.Tensor) -> tf.Tensor:
        return tf.random.fold_in(_epoch_seed(one, words), 0)[0]

    draws = _per_epoch(draw, epoch, tf.TensorSpec((), tf.int32))
    return tf.stack([draws, tf.cast(index, tf.int32)], axis=1)


def _epoch_seed(epoch: tf.Tensor, words: tf.Tensor) -> tf.Tensor:
    return tf.random.fold_in(words, tf.cast(epoch, tf.int32))


def _per_epoch(function, epoch: tf.Tensor, spec: tf.TensorSpec) -> tf.Tensor:
    """Maps (B,) epochs, calling `function` once for each distinct one."""
    # Positions of one call are neighbours: mostly one or two epochs, and not one for each of B.
    distinct, place = tf.unique(epoch)
    return tf.gather(tf.map_fn(function, distinct, fn_output_signature=spec), place)
