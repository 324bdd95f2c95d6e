"""Makes batches for other machines: python -m vit_dist.data_service --port=7100 [--host=NAME].

Start one on each machine that is to make batches, and name all of them to the training:
--config.input.service=host1:7100,host2:7100. It serves any number of runs, one after the other or
at once, until Ctrl-C or SIGTERM. The data must have the same paths here as on the training hosts.
"""

import signal
import socket
import threading

from vit_dist.config.errors import ConfigError
from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import tensorflow as tf
from absl import flags

from vit_dist.data.service import serve

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines this command's flags; not at import: other commands have flags of the same names."""
    flags.DEFINE_integer("port", 7100, "what --config.input.service names", 1, 65535)
    flags.DEFINE_integer("worker_port", 0, "a second one, for the batches; 0: any", 0, 65535)
    flags.DEFINE_string("host", None, "this machine as others reach it; its own name by default")


def main() -> int:
    """The command; returns its exit code."""
    # Other machines are told this name. One that means nothing even here is a mistake to name now,
    # not when a training cannot connect.
    host = FLAGS.host or socket.getfqdn()
    try:
        socket.getaddrinfo(host, FLAGS.port)
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--host {host!r} is no known name or address: {reason}") from error
    # The servers have threads of their own; the main thread only waits for a signal.
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # Batches are made on the CPU; TensorFlow would take all memory of a GPU that others may use.
    tf.config.set_visible_devices([], "GPU")
    servers = serve(host, FLAGS.port, FLAGS.worker_port)
    print(f"ready: --config.input.service={host}:{FLAGS.port}", flush=True)
    stop.wait()
    # Their destructors stop them.
    del servers
    return 0


def script() -> None:
    """The program vit-dist-data-service: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
