"""Lends a host's TPU chips to the program: python -m vit_dist.tpu_worker, on each host of a slice.

A TPU slice of several hosts is driven by one program, python -m vit_dist.train on host 0, through a
TensorFlow server on every host, host 0 included. This is that server. It ends when the program
does, with the program's exit code. launch/tpu_vm.sh and launch/jobset_tpu.yaml start both.
"""

import signal
import socket
from collections.abc import Callable
from typing import Any

from vit_dist.run import cli  # imported before TensorFlow, which needs variables about the TPU

# isort: split
import tensorflow as tf
from absl import flags, logging

from vit_dist.cluster import metadata, tpu_vm
from vit_dist.cluster.tpu_slice import attend, line_port
from vit_dist.config.errors import ConfigError
from vit_dist.run.facts import code_facts

FLAGS = flags.FLAGS
_JOB = "tpu_worker"  # as Google's own worker calls it; the program renames it when it connects
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def define_flags() -> None:
    """Defines this command's flags; not at import: other commands have flags of the same names."""
    flags.DEFINE_integer("port", tpu_vm.PORT, "of TensorFlow; the line's is 10 below", 1034, 65535)
    flags.DEFINE_float("wait", 1800.0, "seconds to wait for the program on host 0", 0.0)


def main() -> int:
    """The command; returns its exit code."""
    logging.set_verbosity(logging.INFO)
    vm, problem = tpu_vm.found()
    if problem is not None:
        raise ConfigError(f"found no TPU ({problem})")
    if vm is not None and len(vm.hosts) == 1:
        print("this TPU has one host: the program drives it without a worker", flush=True)
        return 0
    reasons: list[str] = []  # to stop; the first is told to the program, which saves and ends us
    install = _handlers(reasons)

    # Called every second. When the program connects, TensorFlow replaces the handler of SIGTERM by
    # one of its own, which swallows the signal; so ours are put back again and again.
    def asked() -> str | None:
        install()
        return reasons[0] if reasons else None

    with _listen(FLAGS.port) as calls, metadata.watch(reasons.append):
        _serve(FLAGS.port)
        install()
        print(f"ready: waiting for the program at port {FLAGS.port}", flush=True)
        return attend(calls, facts=code_facts(), asked=asked, patience=FLAGS.wait)


def _handlers(reasons: list[str]) -> Callable[[], None]:
    """A function that sets handlers which note signals; what is ignored now stays ignored."""
    numbers = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]

    def note(number: int, frame: Any) -> None:
        reasons.append(signal.Signals(number).name)

    def install() -> None:
        for number in numbers:
            signal.signal(number, note)

    return install


def _listen(port: int) -> socket.socket:
    """Listens for the program's line.

    Raises:
      ConfigError: a port is in use.
    """
    try:
        # TensorFlow's own server would share a port that is in use already, without an error.
        with socket.create_server(("", port)):
            pass
        return socket.create_server(("", line_port(port)))
    except OSError as error:
        raise ConfigError(
            f"the ports {port} and {line_port(port)} are needed, and one is in use "
            f"({error.strerror}): end the worker that has it, or give another --port"
        ) from None


def _serve(port: int) -> Any:
    """Starts TensorFlow's server, which serves until the process ends."""
    cluster = tf.train.ClusterSpec({_JOB: [f"localhost:{port}"]})
    server = tf.distribute.Server(cluster, job_name=_JOB, task_index=0, protocol="grpc")
    _KEPT.append(server)
    return server


# TensorFlow waits for its connections when a server is destroyed, so it lives as long as Python.
_KEPT: list[Any] = []


def script() -> None:
    """The program vit-dist-tpu-worker: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
