"""The JAX side of costs/compiled.py: libtpu's compiler, on a machine without a TPU.

    python -I tpu_compiler.py --versions                 JSON: package -> version, null if absent
    python -I tpu_compiler.py TOPOLOGY program.hlo       JSON: what the compiler says of the program

It is run as a file by the Python of an environment that has JAX and libtpu. That environment has no
TensorFlow, which brings another version of XLA, so nothing of vit_dist is imported here. The
imports of JAX stand inside of functions, because vit_dist's own environment lacks it.

A program is an HloModuleProto of TensorFlow's. A topology is a generation with the shape of the
slice, such as v5e:1x1 or v5p:2x2x1; the program takes one chip of it. "cpu" stands for this
machine's processor, whose compiler needs no libtpu. benchmarks/gpu_step.py also runs what it has
compiled, on the GPU or the processor of a machine.
"""

import importlib.metadata
import json
import os
import re
import sys
import time
from typing import Any

PACKAGES = ("jax", "jaxlib", "libtpu")
# libtpu's units are binary, whatever they are called. It counts at two places: early, "the total
# memory required for HLO temporaries (47.30G) exceeds available HBM (15.75G)", without arguments
# and within seconds; and at the end of a compilation, "Used 30.92G of 15.75G hbm".
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?)([KMGT]?)i?B?"
_EXCEEDED = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"[Uu]sed {_SIZE} of {_SIZE} hbm"),
)


def prepare() -> None:
    """Sets the variables that libtpu and JAX read; before either is imported."""
    # Without these libtpu asks a TPU host's metadata server, which is not there, what it runs on.
    # The topology that is compiled for is given apart from them.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def device_of(topology: str) -> Any:
    """The device that programs for a topology are compiled for."""
    import jax
    from jax.experimental import topologies

    if topology == "cpu":
        return jax.devices("cpu")[0]
    # The two cores of a v4 chip are two devices by default, of half its memory each. In real slices
    # they are one, as on a v5p, where that is the default.
    chip = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    return topologies.get_topology_desc(topology, platform="tpu", **chip).devices[0]


def compile_hlo(path: str, device: Any) -> Any:
    """Compiles what TensorFlow exported, with the aliasing of variables that it noted.

    A variable's new value takes the memory of its old one, as in a real step.
    """
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax
    from jaxlib.mlir import ir

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
        build = client.compile if device.platform == "tpu" else client.compile_and_load
        return build(module, devices, options)


def _erase_copies(operation: Any) -> None:
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


def figures_of(executable: Any) -> dict[str, float]:
    """What a compiled program needs: bytes, and operations of one run."""
    memory, cost = executable.get_compiled_memory_stats(), executable.cost_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        # Outputs that take the memory of arguments: new values of variables.
        "aliased": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "accessed": cost["bytes accessed"],
        "flops": cost["flops"],
    }


def exceeded(message: str) -> dict[str, float] | None:
    """How much a program would need where it has no room, by the compiler's message.

    Returns:
      {"needed", "limit"}, bytes; zeros if the message has no numbers; None if it tells of something
      else than memory.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = next((m for pattern in _EXCEEDED if (m := pattern.search(message))), None)
    if found is None:
        return {"needed": 0, "limit": 0}
    return {
        "needed": float(found[1]) * _UNITS[found[2]],
        "limit": float(found[3]) * _UNITS[found[4]],
    }


def versions() -> dict[str, str | None]:
    """The versions of what compiles; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    """Prints one line of JSON."""
    if sys.argv[1:] == ["--versions"]:
        print(json.dumps(versions()))
        return
    topology, path = sys.argv[1:]
    prepare()
    device = device_of(topology)
    began = time.monotonic()
    try:
        found = figures_of(compile_hlo(path, device))
    # jaxlib's own error class, which moves from release to release.
    except Exception as error:
        too_large = exceeded(str(error))
        if too_large is None:
            raise
        found = too_large
    print(json.dumps({**found, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
