"""What benchmarks share that start processes: the memory of one, as Linux tells it, and ports."""

import re
import socket
from pathlib import Path


def memory(key: str) -> int:
    """Bytes of this process in memory: "VmRSS" at this moment, "VmHWM" the most so far."""
    line = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) * 1024


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens."""
    # All are opened before any is closed, so that they differ.
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
