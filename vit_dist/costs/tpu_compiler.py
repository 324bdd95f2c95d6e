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
import math
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
_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}
# bf16[32,196,768]{2,1,0:T(8,128)(2,1)S(1)}: dtype, shape, layout, where S names the memory; without
# an S the device's own, off the chip.
_TENSOR = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%([\w.\-]+) = (.*)$", re.MULTILINE)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
# These move nothing: names for what is there, and the ends of copies whose beginning was counted.
_NAMES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_NOTHING = _NAMES | {"copy-done", "slice-done"}


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


def figures_of(executable: Any, *, scheduled: bool = False) -> dict[str, float]:
    """What a compiled program needs: bytes, and operations of one run.

    Args:
      executable: jaxlib's.
      scheduled: whether it is a TPU's, whose text tells what `schedule_of` reads; else that is 0.
    """
    schedule = {"cycles": 0.0, "offchip": 0.0}
    if scheduled:
        schedule = schedule_of(executable.hlo_modules()[0].to_string())
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
        **schedule,
    }


def schedule_of(text: str) -> dict[str, float]:
    """What the compiler expects of a program that it has scheduled, from the program's own text.

    Returns:
      "cycles": of all operations one after the other, as the compiler estimates each to choose its
      form; copies to and from the chip, which go on meanwhile, have none.
      "offchip": bytes that cross between the device's memory and the chip: operands and results of
      each operation that are not in the chip's own memory, and copies between the two.
      Loops count as often as they turn where the text tells that, and else once.
    """
    found = {
        m[2]: (bool(m[1]), text[m.end() : text.index("\n}", m.end())])
        for m in _COMPUTATION.finditer(text)
    }
    entry = next(name for name, (is_entry, _) in found.items() if is_entry)

    def add_up(name: str) -> tuple[int, int]:
        cycles = offchip = 0
        types: dict[str, str] = {}
        for instruction in _INSTRUCTION.finditer(found[name][1]):
            type_, operation, operands, rest = _parts(instruction[2])
            types[instruction[1]] = type_
            if operation == "while":
                turns, body = _TURNS.search(rest), _BODY.search(rest)
                # A loop of unknown length counts once, as in the compiler's own sums.
                more = add_up(body[1])  # type: ignore[index]
                times = int(turns[1]) if turns else 1
                cycles, offchip = cycles + times * more[0], offchip + times * more[1]
                continue
            if operation in _NOTHING:
                continue
            if estimate := _CYCLES.search(rest):
                cycles += int(estimate[1])
            if operation in ("copy-start", "slice-start"):
                # The tuple has destination, source and a semaphore, or the source in a tuple of its
                # own first. What is copied is as large as the destination.
                tensors = _tensors(type_)
                to, source = tensors[:2] if operation == "copy-start" else tensors[1::-1]
                offchip += to[0] * (to[1] + source[1])
                continue
            # An operand that is a tuple is not read whole.
            read = [t for name in operands if not (t := types.get(name, "(")).startswith("(")]
            offchip += sum(size for t in (type_, *read) for size, off in _tensors(t) if off)
        return cycles, offchip

    cycles, offchip = add_up(entry)
    return {"cycles": cycles, "offchip": offchip}


def _parts(instruction: str) -> tuple[str, str, list[str], str]:
    """ "TYPE operation(%a, %b), rest" -> the type, the operation, names of operands, the rest."""
    end = _closing(instruction) if instruction.startswith("(") else instruction.index(" ")
    type_, call = instruction[:end], instruction[end:].lstrip()
    operation = call[: call.index("(")]
    inside = call[len(operation) :]
    end = _closing(inside)
    return type_, operation, re.findall(r"%([\w.\-]+)", inside[:end]), inside[end:]


def _closing(text: str) -> int:
    """Where the parenthesis that the text begins with is closed."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if not depth:
            return index + 1
    raise ValueError(f"a parenthesis without end: {text[:100]}")


def _tensors(type_: str) -> list[tuple[int, bool]]:
    """Bytes of each tensor of a type, and whether it is in the device's memory, off the chip."""
    return [
        (
            _BYTES.get(m[1], 0) * math.prod(int(n) for n in m[2].split(",") if n),
            "S(" not in (m[3] or ""),
        )
        for m in _TENSOR.finditer(type_)
    ]


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
        found = figures_of(compile_hlo(path, device), scheduled=topology != "cpu")
    # jaxlib's own error class, which moves from release to release.
    except Exception as error:
        too_large = exceeded(str(error))
        if too_large is None:
            raise
        found = too_large
    print(json.dumps({**found, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
