"""Hosts of a run that are threads of a test."""

import socket
import threading


def free_addresses(count):
    """ "localhost:port", where nobody listens."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def in_threads(function, indices):
    """index -> None, or the exception that function(index) ended with; all run at once."""
    outcome = {}

    def one(index):
        try:
            outcome[index] = function(index)
        except BaseException as error:
            outcome[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in indices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome
