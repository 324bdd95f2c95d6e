"""The peer of tpu_compile.py: the step of _flax_step.py, compiled for a TPU.

    python benchmarks/_tpu_peer.py TOPOLOGY VARIANT BATCH PIXELS [DEPTH]

Prints one line of JSON, as vit_dist/costs/tpu_compiler.py does.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path

# By its path: this environment has JAX, and nothing that vit_dist imports.
_PATH = Path(__file__).resolve().parents[1] / "vit_dist" / "costs" / "tpu_compiler.py"
_SPEC = importlib.util.spec_from_file_location("tpu_compiler", _PATH)
tpu_compiler = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tpu_compiler)
tpu_compiler.prepare()  # before JAX is imported

from _flax_step import compile_step  # noqa: E402


def main() -> None:
    topology, variant, batch_size, pixels, *depth = sys.argv[1:]
    device = tpu_compiler.device_of(topology)
    began = time.monotonic()
    depths = {"depth": int(depth[0])} if depth else {}
    sizes = {"image_size": int(pixels), **depths}
    compiled, _ = compile_step(device, variant, int(batch_size), **sizes)
    found = tpu_compiler.figures_of(compiled.runtime_executable(), scheduled=topology != "cpu")
    print(json.dumps({**found, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
