"""Hosts of a run: their addresses, and what each is told; or threads of a test in their place."""

import socket
import threading

from tests.support.engines import tf_config
from tests.support.waiting import wait_for


def free_addresses(count):
    """ "localhost:port", where nobody listens."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def environments(count):
    """What each host of a cluster of so many is started with, at addresses where nobody listens."""
    cluster = {"worker": free_addresses(count)}
    return [tf_config(cluster, index=index) for index in range(count)]


def in_threads(function, indices):
    """index -> None, or the exception that function(index) ended with; all run at once.

    A thread that hangs fails the test and is left behind; it does not keep the process from ending.
    """
    outcome = {}

    def one(index):
        try:
            outcome[index] = function(index)
        except BaseException as error:
            outcome[index] = error

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in indices]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(outcome) == len(threads), 200)
    return outcome
