"""The training step restated in JAX and optax: python optax_peer.py IN.npz OUT.npz.

Runs in an environment with JAX and optax (no TensorFlow). IN holds "images" (steps, B, height,
width, 3) in [-1, 1], "labels" (steps, B), the weights as "model/NAME", and "recipes": JSON, name
-> options. OUT holds for each recipe its losses, and the weights and averages at the end.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

KERNEL = re.compile(r"attention/(query|key|value|out)/kernel$")


def with_heads(w, heads):
    """Attention's kernels as flax and big_vision store them: (D, H, K), and (H, K, D) for out."""

    def cut(name, value):
        inside, size = KERNEL.search(name), value.shape[-1]
        if not inside:
            return value
        parts = (heads, size // heads)
        return value.reshape((*parts, size) if inside[1] == "out" else (size, *parts))

    return {name: cut(name, value) for name, value in w.items()}


def flat(w):
    """Back: attention's kernels as matrices (D, D)."""
    return {
        name: value.reshape(round(value.size**0.5), -1) if KERNEL.search(name) else value
        for name, value in w.items()
    }


def vit(w, x, *, heads, patch):
    """A pre-LN ViT with learned positions, mean pooling, tanh GELU; weights by vit_dist's names."""
    rows, columns = x.shape[1] // patch, x.shape[2] // patch
    x = x.reshape(-1, rows, patch, columns, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(-1, rows * columns, patch * patch * 3)
    kernel = w["embedding/kernel"]
    x = x @ kernel.reshape(-1, kernel.shape[-1]) + w["embedding/bias"] + w["pos_embedding"]

    def norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-6) * w[f"{name}/gamma"] + w[f"{name}/beta"]

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    depth = sum(re.fullmatch(r"encoderblock_\d+/norm_0/beta", name) is not None for name in w)
    for block in (f"encoderblock_{i}" for i in range(depth)):
        y = norm(x, f"{block}/norm_0")
        q, k, v = (split(y @ w[f"{block}/attention/{n}/kernel"]) for n in ("query", "key", "value"))
        weights = jax.nn.softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]), axis=-1)
        y = (weights @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + y @ w[f"{block}/attention/out/kernel"] + w[f"{block}/attention/out/bias"]
        y = norm(x, f"{block}/norm_1")
        y = y @ w[f"{block}/mlp/dense_0/kernel"] + w[f"{block}/mlp/dense_0/bias"]
        y = jax.nn.gelu(y, approximate=True) @ w[f"{block}/mlp/dense_1/kernel"]
        x = x + y + w[f"{block}/mlp/dense_1/bias"]
    x = norm(x, "encoder_norm").mean(1)
    return x @ w["head/kernel"] + w["head/bias"]


FIRST = ("mu", "trace", "ema")  # how optax's states name first moments


def stored(inner, dtype):
    """`inner`, in float32, with its first moments kept as `dtype` from one update to the next."""

    def cast(state, to):
        if not hasattr(state, "_fields"):  # of a chain
            return tuple(cast(part, to) for part in state)
        own = {name: getattr(state, name) for name in FIRST if name in state._fields}
        return state._replace(**jax.tree.map(lambda x: x.astype(to), own))

    def update(gradient, state, params):
        moved, state = inner.update(gradient, cast(state, jnp.float32), params)
        return moved, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def rule(name, momentum_dtype):
    """The direction of descent from optax's own parts, before decay and learning rate."""
    adam = {"b1": 0.9, "b2": 0.999, "mu_dtype": momentum_dtype}
    if name == "adamw":
        return optax.scale_by_adam(eps=1e-8, **adam)
    if name == "lamb":
        return optax.scale_by_adam(eps=1e-6, **adam)
    if name == "sgd":
        return optax.trace(0.9, accumulator_dtype=momentum_dtype)
    if name == "lion":
        return optax.scale_by_lion(0.9, 0.99, mu_dtype=momentum_dtype)
    if name == "adafactor":  # as optax.adafactor
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        )
    assert name == "adafactor_vit", name  # as big_vision's scale_by_adafactor
    return optax.chain(
        optax.scale_by_factored_rms(
            min_dim_size_to_factor=32,
            decay_rate_fn=lambda i, e: jnp.minimum(0.999, 1 - (jnp.float32(i) + 1) ** -e),
        ),
        optax.ema(0.9, debias=False, accumulator_dtype=momentum_dtype),
    )


def optimizer(recipe, weights):
    mask = {name: name.endswith("kernel") for name in weights}
    schedule = optax.warmup_cosine_decay_schedule(
        recipe["start"] * recipe["rate"], recipe["rate"], recipe["warmup"], recipe["total"],
        recipe["end"] * recipe["rate"],
    )  # fmt: skip
    decay = optax.add_decayed_weights(recipe["decay"], mask)
    trust = [optax.masked(optax.scale_by_trust_ratio(), mask)] if recipe["name"] == "lamb" else []
    return optax.chain(
        optax.clip_by_global_norm(recipe["clip"]),
        rule(recipe["name"], recipe["momentum_dtype"])
        if recipe["optax_multiplies"]
        else stored(rule(recipe["name"], "float32"), recipe["momentum_dtype"]),
        decay,
        *trust,
        optax.scale_by_schedule(schedule),
        optax.scale(-1.0),
    )


def train(recipe, weights, images, labels, *, heads, patch):
    if recipe["name"] == "adafactor_vit":
        weights = with_heads(weights, heads)
    transform = optimizer(recipe, weights)

    def loss_of(w, x, y):
        logits = vit(flat(w), x, heads=heads, patch=patch)
        targets = optax.smooth_labels(jax.nn.one_hot(y, logits.shape[-1]), recipe["smoothing"])
        return optax.softmax_cross_entropy(logits, targets).mean()

    @jax.jit
    def step(w, average, state, x, y):
        loss, gradient = jax.value_and_grad(loss_of)(w, x, y)
        updates, state = transform.update(gradient, state, w)
        w = optax.apply_updates(w, updates)
        return w, optax.incremental_update(w, average, 1 - recipe["ema"]), state, loss

    average, state, losses = weights, transform.init(weights), []
    for x, y in zip(images, labels, strict=True):
        weights, average, state, loss = step(weights, average, state, x, y)
        losses.append(loss)
    return losses, flat(weights), flat(average)


def factored(cases):
    """JSON: name -> shape; what 20 updates of big_vision's Adafactor sum up to, by name.

    The gradients of update i are numpy's default_rng(i) in the order of the names.
    """
    transform = rule("adafactor_vit", "float32")
    total = {name: jnp.zeros(shape) for name, shape in cases.items()}
    state, update = transform.init(total), jax.jit(transform.update)
    for i in range(20):
        rng = np.random.default_rng(i)
        gradient = {n: jnp.asarray(rng.standard_normal(s, np.float32)) for n, s in cases.items()}
        moved, state = update(gradient, state, total)
        total = {name: total[name] + moved[name] for name in cases}
    return {f"factored/{name}": np.asarray(value) for name, value in total.items()}


def rsqrt(peak, timescale):
    """big_vision's, counted from the end of its warmup."""
    return lambda count: peak / jnp.sqrt((count + timescale) / timescale)


def schedules(cases):
    """JSON: name -> [optax function, arguments, steps]; returns name -> rates."""
    out = {}
    for name, (function, arguments, boundaries, steps) in cases.items():
        if boundaries:
            make = rsqrt if function == "rsqrt" else getattr(optax, function)
            parts = [optax.linear_schedule(*boundaries[:3]), make(**arguments)]
            schedule = optax.join_schedules(parts, [boundaries[2]])
        else:
            if "boundaries_and_scales" in arguments:
                scales = arguments["boundaries_and_scales"]
                arguments["boundaries_and_scales"] = {int(k): v for k, v in scales.items()}
            schedule = getattr(optax, function)(**arguments)
        out[f"schedule/{name}"] = np.array([schedule(s) for s in steps])
    return out


def main():
    data = dict(np.load(sys.argv[1]))
    recipes = json.loads(str(data.pop("recipes")))
    out = schedules(json.loads(str(data.pop("schedules"))))
    out |= factored(json.loads(str(data.pop("factored"))))
    sizes = {"heads": int(data.pop("heads")), "patch": int(data.pop("patch"))}
    images, labels = data.pop("images"), data.pop("labels")
    weights = {k.removeprefix("model/"): jnp.asarray(v) for k, v in data.items()}
    for key, recipe in recipes.items():
        losses, final, average = train(recipe, weights, images, labels, **sizes)
        out[f"{key}/losses"] = np.array(losses)
        out |= {f"{key}/model/{name}": np.asarray(v) for name, v in final.items()}
        out |= {f"{key}/ema/{name}": np.asarray(v) for name, v in average.items()}
    np.savez(sys.argv[2], **out)


if __name__ == "__main__":
    main()
