"""A training step as one would write it with flax and optax: the peer of ours on accelerators.

The numerics are those of big_vision's ViT: bfloat16 products, residuals and softmax, float32
statistics in the LayerNorms.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


class Block(nn.Module):
    """A pre-LN transformer block."""

    num_heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.num_heads, dtype=jnp.bfloat16)(y, y)
        y = nn.LayerNorm()(x)
        y = nn.gelu(nn.Dense(4 * width, dtype=jnp.bfloat16)(y))
        return x + nn.Dense(width, dtype=jnp.bfloat16)(y)


class ViT(nn.Module):
    """A ViT with a mean over the tokens as pool."""

    width: int
    depth: int
    num_heads: int
    patch: int

    @nn.compact
    def __call__(self, images):
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, "VALID", dtype=jnp.bfloat16)(images)
        x = x.reshape(len(x), -1, self.width)
        table = self.param("posemb", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + table.astype(x.dtype)
        for _ in range(self.depth):
            x = Block(self.num_heads)(x)
        return nn.Dense(1000)(nn.LayerNorm()(x).mean(1))


def compile_step(
    device, variant: str, batch_size: int, *, image_size: int = 224, depth: int | None = None
) -> tuple:
    """Compiles a training step for a device.

    Returns:
      The jax.stages.Compiled of (params, state, images, labels) -> (params, state, loss), which
      donates the first two; and the shapes of these arguments.
    """
    size, patch = variant.split("/")
    width, own_depth, heads = SIZES[size]
    model = ViT(width, depth or own_depth, heads, int(patch))
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10_000, 100_000)
    kernels = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1, mask=kernels)
    )

    def step(params, state, images, labels):
        def loss(params):
            logits = model.apply(params, images.astype(jnp.float32) / 127.5 - 1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    # Shapes only: nothing is computed, so no array is needed.
    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    state = jax.eval_shape(optimizer.init, params)
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        (params, state, images, labels),
    )
    # Donated: the new parameters and state take the memory of the old ones, as in our step.
    return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile(), arguments
