"""Less memory for more arithmetic: the backward pass computes again what it would have kept.

Shapes: B batch, H heads, N queries, M keys, K width of a head, n blocks of m keys.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from vit_dist.model.xla import barrier, in_xla

# What a block computes again, each of them more than the one before: nothing; attention's logits,
# weights and sum; these, and the MLP's hidden layer; the whole block.
POLICIES = ("none", "attention", "attention_mlp", "full")


def rematerialized(
    function: Callable[..., tf.Tensor], *, seed: tf.Tensor | None = None
) -> Callable[..., tf.Tensor]:
    """Returns a function that computes `function` and keeps only the arguments for its gradient.

    The backward pass computes everything between arguments and output again (Chen et al., arXiv
    1604.06174).

    Args:
      function: floating tensors, and a keyword `seed` if there is one -> one tensor. What else it
        reads comes from its closure and gets no gradient.
      seed: of random masks, which are then drawn again and not kept; None for none.
    """
    draws = {} if seed is None else {"seed": seed}

    @tf.custom_gradient
    def run(x: tf.Tensor, *others: tf.Tensor):
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            # One input that waits for the gradient is enough: all that is computed depends on it.
            # But for masks, which depend on the seed alone.
            later, upstream, again = _after(x, upstream, draws)
            inputs = [later, *others]
            # Only the arguments are watched: variables must get their gradients as arguments, see
            # rematerialized_layers.
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(inputs)
                y = function(*inputs, **again)
            return tape.gradient(y, inputs, upstream, unconnected_gradients="zero")

        return function(x, *others, **draws), gradient

    return run


def _after(
    x: tf.Tensor, upstream: tf.Tensor, draws: dict[str, tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor, dict[str, tf.Tensor]]:
    """Returns its arguments, made to depend on `upstream`, the gradient of the output.

    Without that dependence XLA would see that the forward pass has computed the same expressions of
    x before, merge the two, and keep the results in memory after all. Control dependencies do not
    exist in XLA. Two things together hold on every kind of device, and where XLA does not compile:

    - XLA's optimization barrier, on GPUs and TPUs. The compiler for CPUs drops it too early.
    - A zero computed from `upstream`, added to x, as in tf.recompute_grad: on CPUs. The compiler
      for TPUs sees that it is zero and leaves it out. Seeds get none: drawing takes long on
      CPUs, so masks are kept there.
    """
    if in_xla():
        # `upstream` comes back through the barrier and is used: a result that nobody used would be
        # taken out of the barrier, and x would wait for nothing.
        x, upstream, *seeds = barrier(x, upstream, *draws.values())
        draws = dict(zip(draws, seeds, strict=True))
    first = tf.cast(tf.reshape(upstream, [-1])[0], tf.bool)
    # Always 0, in a way that XLA's simplifier does not see through on CPUs.
    zero = tf.where(tf.equal(first, first), 0.0, float("nan"))
    return x + tf.cast(zero, x.dtype), upstream, draws


def rematerialized_layers(
    function: Callable[..., tf.Tensor],
    layers: Sequence[keras.layers.Layer],
    x: tf.Tensor,
    *,
    seed: tf.Tensor | None = None,
) -> tf.Tensor:
    """function(x, seed=seed), keeping x and the seed alone; the weights of `layers` get gradients.

    Args:
      function: x, and a keyword `seed` if there is one -> one tensor, by these layers.
      layers: all whose variables the function reads.
      x: floating.
      seed: of random masks; None for none.
    """
    # A custom gradient returns gradients for its arguments alone, so the weights become arguments.
    # In the StatelessScope the layers read `values` in place of their variables.
    weights = [weight for layer in layers for weight in layer.weights]

    def call(x: tf.Tensor, *values: tf.Tensor, **draws: tf.Tensor) -> tf.Tensor:
        mapping = list(zip(weights, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping, initialize_variables=False):
            return function(x, **draws)

    values = (tf.convert_to_tensor(w.value) for w in weights)
    return rematerialized(call, seed=seed)(x, *values)


def blockwise_attention(
    query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, *, block_size: int
) -> tf.Tensor:
    """softmax(query key^T) value, over `block_size` keys at a time, forwards and backwards.

    Memory grows with N + M instead of N M (Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv
    2205.14135); arithmetic by the logits, computed again in the backward pass. Softmax and sums
    are float32.

    Args:
      query: (B, H, N, K), scaled already.
      key, value: (B, H, M, K).
      block_size: m; M need not be a multiple.

    Returns:
      (B, H, N, K), of value's type.
    """
    num_keys = key.shape[2]
    num_blocks = -(-num_keys // block_size)
    # Keys are cut into whole blocks, the last one padded.
    # -inf added to the logits of padding, so that its weight is exp(-inf) = 0.
    index = tf.reshape(tf.range(num_blocks * block_size), (num_blocks, block_size))
    bias = tf.where(index < num_keys, 0.0, float("-inf"))

    @tf.custom_gradient
    def attend(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor):
        keys, values = (_split(x, num_blocks, block_size) for x in (key, value))
        # What the backward pass finds in memory: the arguments, y and one number for each row.
        y, lse = _forwards(query, keys, values, bias)

        def gradient(upstream: tf.Tensor):
            # Kept for it from the forward pass: the inputs, the output and one number for each row.
            d_query, *others = _backwards(query, keys, values, bias, y, lse, upstream)
            return (tf.cast(d_query, query.dtype), *(_join(x, num_keys) for x in others))

        return tf.cast(y, value.dtype), gradient

    return attend(query, key, value)


def _logits(query: tf.Tensor, keys: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.matmul(query, keys, transpose_b=True), tf.float32) + bias


def _forwards(query: tf.Tensor, keys: tf.Tensor, values: tf.Tensor, bias: tf.Tensor):
    """float32: the output (B, H, N, K), and each row's log of the sum of exp, (B, H, N, 1).

    A softmax over keys that come block by block: `peak` is each row's largest logit so far, `total`
    its sum of exp(logit - peak), `y` the sum of the values with these weights.
    """

    def body(i: tf.Tensor, peak: tf.Tensor, total: tf.Tensor, y: tf.Tensor):
        logits = _logits(query, keys[i], bias[i])
        # The peak is subtracted before exp, so that no weight overflows; it may grow with a block.
        higher = tf.maximum(peak, tf.reduce_max(logits, -1, keepdims=True))
        # What was summed relative to the old peak is rescaled to the new one.
        weights, shrink = tf.exp(logits - higher), tf.exp(peak - higher)
        more = tf.matmul(tf.cast(weights, values.dtype), values[i])
        total = total * shrink + tf.reduce_sum(weights, -1, keepdims=True)
        return i + 1, higher, total, y * shrink + tf.cast(more, tf.float32)

    zero = tf.zeros_like(query, tf.float32)
    column = tf.zeros_like(query[..., :1], tf.float32)
    # At first no logit is known: a peak of -inf, for which shrink is exp(-inf) = 0.
    start = (0, column - float("inf"), column, zero)
    _, peak, total, y = _loop(keys.shape[0], body, start)
    # Log of the sum of exp(logit), from what is relative to the peak.
    return y / total, peak + tf.math.log(total)


def _backwards(query, keys, values, bias, y, lse, upstream):
    """Gradients of Y = P V, P = softmax(S): dV = P^T dY; dS = P * (dY V^T - row sums of dY * Y).

    P is computed again block by block: exp(S - lse), with `lse` kept from the forward pass.
    """
    mean = tf.reduce_sum(tf.cast(upstream, tf.float32) * y, -1, keepdims=True)  # the row sums

    def body(i: tf.Tensor, d_query: tf.Tensor, d_keys: tf.TensorArray, d_values: tf.TensorArray):
        weights = tf.exp(_logits(query, keys[i], bias[i]) - lse)
        d_value = tf.matmul(tf.cast(weights, values.dtype), upstream, transpose_a=True)
        d_weights = tf.cast(tf.matmul(upstream, values[i], transpose_b=True), tf.float32)
        d_logits = tf.cast(weights * (d_weights - mean), keys.dtype)
        # Sums over blocks are float32: in 16 bits small terms would be lost one after the other.
        d_query += tf.cast(tf.matmul(d_logits, keys[i]), tf.float32)
        d_key = tf.matmul(d_logits, query, transpose_a=True)
        return i + 1, d_query, d_keys.write(i, d_key), d_values.write(i, d_value)

    # Each block's gradients are written where they belong; only the queries' are summed.
    count = keys.shape[0]
    arrays = [tf.TensorArray(x.dtype, count) for x in (keys, values)]
    start = (0, tf.zeros_like(query, tf.float32), *arrays)
    _, d_query, *arrays = _loop(count, body, start)
    return d_query, *(array.stack() for array in arrays)


def _loop(count: int, body: Callable[..., tuple], start: tuple) -> tuple:
    return tf.while_loop(lambda i, *_: i < count, body, start, maximum_iterations=count)


def _split(x: tf.Tensor, num_blocks: int, block_size: int) -> tf.Tensor:
    """(B, H, M, K) -> (n, B, H, m, K), padded with zeros."""
    padding = num_blocks * block_size - x.shape[2]
    x = tf.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
    # M becomes (n, m); the axis of blocks then goes to the front, where a loop indexes it.
    x = tf.reshape(x, (-1, x.shape[1], num_blocks, block_size, x.shape[3]))
    return tf.transpose(x, (2, 0, 1, 3, 4))


def _join(x: tf.Tensor, num_keys: int) -> tf.Tensor:
    """(n, B, H, m, K) -> (B, H, M, K)."""
    blocks, _, heads, size, width = x.shape
    x = tf.reshape(tf.transpose(x, (1, 2, 0, 3, 4)), (-1, heads, blocks * size, width))
    # The padding of _split goes again.
    return x[:, :, :num_keys]
