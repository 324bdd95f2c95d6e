"""Processes that time training steps on request: ours and timm's."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-interop" / "bin" / "python"
OURS, PEERS = "_step_worker.py", "_timm_worker.py"


class Worker:
    """A process that times steps on request.

    Args:
      python: the interpreter.
      script: OURS or PEERS.
      arguments: of the script.
      env: more variables.
      wait: whether to wait until it has compiled; else call `wait_until_ready`. Workers of a
        cluster wait for each other.
    """

    def __init__(
        self,
        python: str,
        script: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        wait: bool = True,
    ):
        env = {**os.environ, "PYTHONPATH": str(HERE.parent), **(env or {})}
        self.process = subprocess.Popen(
            [python, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.num_params = -1
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        # A worker prints "ready N" when it has compiled.
        self.num_params = int(self._read().split()[1])

    def _read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with code {self.process.wait()}")
        return line

    def begin(self, steps: int) -> None:
        """Starts so many steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def finish(self) -> float:
        """The seconds of the steps that were started."""
        return float(self._read())

    def seconds(self, steps: int) -> float:
        """Runs so many steps; returns their seconds."""
        self.begin(steps)
        return self.finish()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
