"""What libtpu's compiler says of a program, without a TPU: memory, bytes, operations, code size.

The compiler is in an environment of its own, because JAX and TensorFlow bring different versions of
XLA; tpu_compiler.py runs there as a subprocess. A compilation takes seconds to minutes, so what it
found is kept, in a file for each program and version of the compiler.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from absl import logging

from vit_dist.config.errors import ConfigError, UserError

_SCRIPT = Path(__file__).with_name("tpu_compiler.py")
# The Makefile makes it in a checkout.
DEFAULT_PYTHON = str(Path(__file__).parents[2] / ".venv-tpu-compile" / "bin" / "python")
HOW_TO_INSTALL = (
    "libtpu's compiler is in an environment of its own: in a checkout run `make .venv-tpu-compile/"
    ".installed`; elsewhere `python -m venv DIR`, DIR/bin/pip install 'vit_dist[tpu-compile]' "
    "(1 GB, no TensorFlow), and name DIR/bin/python"
)
# Generation -> the smallest slice of which the compiler knows the chips. One of them is compiled
# for: v4 and v5p have no smaller slices than a host's four chips.
TOPOLOGIES = {
    "TPU v4": "v4:2x2x1",
    "TPU v5e": "v5e:1x1",
    "TPU v5p": "v5p:2x2x1",
    "TPU v6e": "v6e:1x1",
}
# Cycles per second, of chips that have one core: 197 TFLOP/s of four units of 128 x 128 products,
# each a multiplication and an addition.
CLOCKS = {"TPU v5e": 1.5e9}
# Another shape of the files of the cache: those of before are not read.
_FORMAT = 2
_TAIL = 1500  # characters of what a compiler that broke wrote


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program as it was compiled for one device.

    Attributes:
      arguments: bytes of what it is given: variables and a batch.
      outputs, aliased: bytes of what it returns, and of the part that takes arguments' memory.
      temp: bytes beside both while it runs: activations, mostly.
      code: bytes of the program.
      accessed: bytes that it reads and writes, copies between the memories of a chip included; of a
        loop only one turn is counted.
      flops: operations of all kinds; of a loop one turn.
      cycles: of all operations one after the other, as the TPU's compiler estimates each to choose
        its form; of a loop one turn, if the program does not tell how many. 0 for other devices.
      offchip: bytes of `accessed` that cross between the device's memory and the chip, of a loop as
        `cycles`; 0 for other devices than TPUs.
      seconds: that the compilation took.
    """

    arguments: float
    outputs: float
    aliased: float
    temp: float
    code: float
    accessed: float
    flops: float
    seconds: float
    cycles: float = 0.0
    offchip: float = 0.0

    @property
    def memory(self) -> float:
        """Bytes that a device needs while it runs."""
        return self.arguments + self.outputs - self.aliased + self.temp + self.code


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """The compiler's answer for a program that a device has no room for.

    Attributes:
      needed: bytes that it would take, without arguments where the compiler gave up early; 0 if the
        compiler did not say.
      limit: bytes that a program gets; 0 if it did not say.
      seconds: until it said so.
    """

    needed: float
    limit: float
    seconds: float


class Compiler:
    """libtpu's compiler, in another Python.

    Args:
      python: the interpreter of an environment with JAX and libtpu.
      cache: a folder that keeps what was found; None for `cache_folder()`.

    Raises:
      ConfigError: that is no Python, or it lacks JAX or libtpu.
    """

    def __init__(self, python: str = DEFAULT_PYTHON, *, cache: str | None = None):
        self.python = os.path.expanduser(python)
        self._cache = Path(cache) if cache else cache_folder()
        try:
            self._versions: dict[str, str | None] = json.loads(self._run("--versions"))
        except (OSError, ValueError, UserError) as error:
            raise ConfigError(
                f"{python} is no Python that runs: {error}. {HOW_TO_INSTALL}"
            ) from None

    def compile(self, program: bytes, topology: str) -> Compiled | TooLarge:
        """Compiles an HloModuleProto, or takes what was kept of an earlier time.

        Args:
          program: the module.
          topology: of TOPOLOGIES, or "cpu" for this machine's processor.

        Raises:
          ConfigError: JAX or libtpu is not installed in that environment.
          UserError: the compiler broke; with the end of what it wrote.
        """
        needed = ("jax",) if topology == "cpu" else ("jax", "libtpu")
        missing = [name for name in needed if not self._versions.get(name)]
        if missing:
            raise ConfigError(f"{self.python} has no {' and no '.join(missing)}: {HOW_TO_INSTALL}")
        kept = self.kept(program, topology)
        # What cannot be read, or is torn, is compiled again.
        with contextlib.suppress(OSError, ValueError):
            return _read(json.loads(kept.read_text()))
        found = self._compile(program, topology)
        try:
            # Written whole, or not at all: another process may look for it at this moment.
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(found))
            temporary.replace(kept)
        # A home that cannot be written to must not cost an answer that took minutes.
        except OSError as error:
            logging.warning("what was compiled is not kept for later: %s", error)
        return _read(found)

    def kept(self, program: bytes, topology: str) -> Path:
        """The file of the cache for a program."""
        # Another compiler gives other figures.
        about = json.dumps([_FORMAT, topology, self._versions], sort_keys=True)
        return self._cache / f"{hashlib.sha256(about.encode() + program).hexdigest()[:32]}.json"

    def _compile(self, program: bytes, topology: str) -> dict[str, Any]:
        with tempfile.NamedTemporaryFile(suffix=".hlo") as file:
            file.write(program)
            file.flush()
            return json.loads(self._run(topology, file.name))

    def _run(self, *words: str) -> str:
        """The last line that the script prints."""
        # -I: neither this process's PYTHONPATH nor the script's folder, whose files are named like
        # modules of others, may stand before the environment's own packages.
        done = subprocess.run(
            [self.python, "-I", str(_SCRIPT), *words], capture_output=True, text=True
        )
        if done.returncode or not done.stdout.strip():
            text = done.stderr.strip()[-_TAIL:] or f"exit code {done.returncode}, and no word"
            raise UserError(f"the compiler broke: {text}")
        return done.stdout.splitlines()[-1]


def cache_folder() -> Path:
    """Where compilations of all programs are kept: ~/.cache/vit_dist/tpu_compile by default."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "vit_dist" / "tpu_compile"


def _read(found: dict[str, Any]) -> Compiled | TooLarge:
    return TooLarge(**found) if "limit" in found else Compiled(**found)
