"""The JAX side of tpu_compile.py and tpu_options.py: libtpu's compiler, on a machine without a TPU.

    python benchmarks/_tpu_compiler.py TOPOLOGY step.hlo                    an HloModuleProto
    python benchmarks/_tpu_compiler.py TOPOLOGY peer VARIANT BATCH [DEPTH]  the peer, see below

With the topology "cpu" JAX compiles for this machine without libtpu, which tests all but libtpu.
Prints one line of JSON: bytes of arguments and temporaries, bytes accessed, flops, and how many
seconds it took to compile.

The peer is the same step as one would write it with flax and optax, in the numerics of big_vision's
ViT: bfloat16 products, residuals and softmax, float32 statistics in the LayerNorms.
"""

import json
import os
import sys
import time

# Without these libtpu asks a TPU host's metadata server, which is not there, what it runs on.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import _jax
from jax.experimental import topologies
from jaxlib.mlir import ir

SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def compile_hlo(path: str, device):
    """Compiles what TensorFlow exported, with the aliasing of variables that it noted.

    A variable's new value takes the memory of its old one, as in a real step.
    """
    with open(path, "rb") as file:
        text = _jax.mlir.hlo_to_stablehlo(file.read())
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=1, device_assignment=np.array([[0]])
    )
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    with context:
        module = ir.Module.parse(text)
        _erase_copies(module.operation)
        # A client for a TPU that is not there can compile a program, but not load it.
        client, devices = device.client, _jax.DeviceList((device,))
        build = client.compile_and_load if device.platform == "cpu" else client.compile
        return build(module, devices, options)


def _erase_copies(operation) -> None:
    """Removes `mhlo.copy`, an identity that TensorFlow's bridge leaves and this compiler lacks."""
    # Children are listed first, as erasing one changes the block.
    for region in operation.regions:
        for block in region:
            for child in list(block):
                _erase_copies(child.operation)
                if child.operation.name == "mhlo.copy":
                    value = child.operation.operands[0]
                    child.operation.results[0].replace_all_uses_with(value)
                    child.operation.erase()


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


def compile_peer(device, variant: str, batch_size: int, depth: int | None = None):
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
    images = jax.ShapeDtypeStruct((batch_size, 224, 224, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    state = jax.eval_shape(optimizer.init, params)
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        (params, state, images, labels),
    )
    # Donated: the new parameters and state take the memory of the old ones, as in our step.
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)
    return lowered.compile().runtime_executable()


def main() -> None:
    topology, what, *rest = sys.argv[1:]
    if topology == "cpu":
        device = jax.devices("cpu")[0]
    else:
        device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    began = time.monotonic()
    if what == "peer":
        executable = compile_peer(device, rest[0], *map(int, rest[1:]))
    else:
        executable = compile_hlo(what, device)
    memory, cost = executable.get_compiled_memory_stats(), executable.cost_analysis()
    found = {
        "arguments": memory.argument_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "accessed": cost["bytes accessed"],
        "flops": cost["flops"],
        "seconds": time.monotonic() - began,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
