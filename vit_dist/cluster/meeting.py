"""Who the hosts of a run are, and how they wait for each other before TensorFlow starts."""

import contextlib
import json
import os
import socket
import time

from absl import logging


def cluster_from_environment() -> tuple[list[str], int]:
    """(addresses of the workers, this worker's index) from TF_CONFIG.

    Raises:
      ValueError: TF_CONFIG is not the JSON that TensorFlow asks for.
    """
    text = os.environ["TF_CONFIG"]
    try:
        parsed = json.loads(text)
        workers, task = [str(w) for w in parsed["cluster"]["worker"]], parsed["task"]
        kind, index = task["type"], int(task["index"])
    except (ValueError, KeyError, TypeError):
        workers, kind, index = [], "", 0
    if kind != "worker" or not 0 <= index < len(workers) or any(":" not in w for w in workers):
        raise ValueError(
            "TF_CONFIG must be JSON such as "
            '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, '
            f'"task": {{"type": "worker", "index": 0}}}}, got {text!r}'
        )
    return workers, index


def meet(workers: list[str], index: int, *, timeout_seconds: float) -> None:
    """Returns when all workers have called; TensorFlow would wait for ever, and deaf to SIGTERM.

    The first worker listens at its address before TensorFlow does, and lets the others go at once.

    Args:
      workers: "host:port" of each.
      index: which of them this process is.
      timeout_seconds: how long to wait.

    Raises:
      TimeoutError: names the workers that did not come.
    """
    deadline = time.monotonic() + timeout_seconds
    hello = [f"{i} of {','.join(workers)}\n".encode() for i in range(len(workers))]
    if len(workers) > 1:
        wait = _wait_for_others if index == 0 else _wait_for_first
        missing = wait(workers, hello, index, deadline)
        if missing:
            names = ", ".join(f"{i} ({workers[i]})" for i in missing)
            raise TimeoutError(
                f"worker {index} waited {timeout_seconds:g} s in vain for worker {names}: start "
                "all with the same TF_CONFIG but for the index, or raise strategy.timeout_seconds"
            )


def _wait_for_others(
    workers: list[str], hello: list[bytes], index: int, deadline: float
) -> list[int]:
    port = int(workers[index].rpartition(":")[2])
    callers: dict[bytes, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port)))
        while (missing := set(hello[1:]) - set(callers)) and time.monotonic() < deadline:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            with contextlib.suppress(OSError):  # nobody called, or hung up at once
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(5)  # who says nothing for so long is not one of ours
                callers[caller.makefile("rb").readline()] = caller
        for caller in () if missing else callers.values():
            with contextlib.suppress(OSError):
                caller.sendall(b"go\n")
    return sorted(hello.index(line) for line in missing)


def _wait_for_first(
    workers: list[str], hello: list[bytes], index: int, deadline: float
) -> list[int]:
    host, _, port = workers[0].rpartition(":")
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as first:
                first.sendall(hello[index])
                if first.makefile("rb").readline() == b"go\n":
                    return []
        except OSError as error:
            logging.log_every_n_seconds(logging.INFO, "worker 0 is not there yet: %s", 60, error)
        time.sleep(0.2)
    return [0]
