"""Hosts of a run that are threads of a test."""

import socket
import threading

from tests.support.waiting import wait_for


def free_addresses(count):
    """ "localhost:port", where nobody listens."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


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
