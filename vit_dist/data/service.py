"""Batches that other machines make (tf.data service), in the order that this host would make them.

A service is one dispatcher with one worker. Element number i of this host's dataset comes from
service i % N: service k is sent a dataset of the elements k, k + N, k + 2N, ... alone. So the order
does not depend on which service is fast. As an element is a function of seed and number, a service
that was restarted is sent a dataset of the elements that are still missing. Each element carries
its number, and an element out of turn is refused.
"""

import itertools
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from vit_dist.config.errors import DataError
from vit_dist.data.damage import message_of
from vit_dist.data.pipeline import finish

SERVICE = "data service"  # how messages name one
# Seconds between two looks at a service that sends nothing; also how long a service may take to
# accept a connection before it counts as gone.
POLL = 1.0
# A restart costs two of them: the service has forgotten the old job, whose reader may then take an
# element of the new one, for a new process counts its jobs from the same number. At the same
# element more often, that element is the cause.
RETRIES = 3

# (k, n) -> the dataset of elements k, k + n, ...; see `from_services`.
Make = Callable[[tuple[tf.Tensor, int]], tf.data.Dataset]


def serve(host: str, port: int, worker_port: int = 0) -> list[Any]:
    """Starts a dispatcher and its worker in this process, which serve while the result is kept.

    Args:
      host: Name or address of this machine, as clients reach it.
      port: Of the dispatcher; clients are given this one.
      worker_port: Of the worker; the dispatcher tells it to clients. 0: any that is free.

    Raises:
      OSError: A port is in use.
    """
    for number in (port, worker_port):
        # TensorFlow's own server would share a port that is in use already, without an error.
        with socket.create_server(("", number)):
            pass
    library = tf.data.experimental.service
    try:
        # Both are returned: a server ends when Python no longer holds its object.
        dispatcher = library.DispatchServer(library.DispatcherConfig(port=port))
        config = library.WorkerConfig(
            dispatcher_address=f"localhost:{port}",
            # TensorFlow puts in the port that the worker got.
            worker_address=f"{host}:%port%",
            port=worker_port,
        )
        return [dispatcher, library.WorkerServer(config)]
    except tf.errors.OpError as error:
        raise OSError(f"cannot serve at {host}:{port}: {message_of(error)}") from error


def parse_addresses(text: str) -> list[str]:
    """Splits "host:port,host:port"; "" gives none.

    Raises:
      DataError: Something that is no address, or one given twice.
    """
    found = [part.strip() for part in text.split(",")] if text.strip() else []
    for address in found:
        # From the right, as an IPv6 address has colons of its own: [::1]:5000.
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
            raise DataError(f"{address!r} is no address: give host:port,host:port,...")
        if found.count(address) > 1:
            raise DataError(
                f"{address} is given twice: each {SERVICE} has one dispatcher of its own"
            )
    return found


def from_services(
    make: Make, addresses: Sequence[str], *, timeout: float, prefetch: int
) -> tf.data.Dataset:
    """Returns a dataset of the elements of `make((0, 1))`, which services make in turns.

    Iterating over it fails with an error whose message `find_failure` understands.

    Args:
      make: (k, n) -> an endless dataset of the elements k, k + n, k + 2n, ..., which calls no
        Python; k is a scalar int64 tensor.
      addresses: "host:port" of each dispatcher.
      timeout: Seconds without an element, or without an answer, after which a service is given up.
      prefetch: Elements kept ready here, and as many by all services together.
    """
    count = len(addresses)
    # The spec of the elements is known once `build` has been traced.
    known: dict[str, Any] = {}

    def build(begin: tf.Tensor) -> tf.Tensor:
        # The service numbers its elements, from 0 at its first one, so that the host can see when
        # one is lost.
        ds = make((begin, count)).enumerate()
        known["spec"] = ds.element_spec
        return tf.data.experimental.to_variant(ds)

    with tf.device("CPU:0"):
        # Traced once, here: another thread must not trace while the training step is traced.
        function = tf.function(build, autograph=False)
        function = function.get_concrete_function(tf.TensorSpec((), tf.int64))

    def ask(address: str, begin: int) -> tf.data.Dataset:
        # from_variant makes a dataset of the variant tensor again. It is not iterated over here;
        # distribute() below sends its graph to the service.
        ds = tf.data.experimental.from_variant(
            function(tf.constant(begin, tf.int64)), known["spec"]
        )
        library = tf.data.experimental.service
        return ds.apply(
            library.distribute(  # without a job_name: each iterator has a job of its own
                library.ShardingPolicy.OFF,
                f"grpc://{address}",
                max_outstanding_requests=-(-prefetch // count),
                compression=None,  # decoded photos hardly shrink
            )
        )

    def elements() -> Iterator[dict[str, np.ndarray]]:
        clients = [
            _Client(address, ask, begin=i, stride=count, timeout=timeout)
            for i, address in enumerate(addresses)
        ]
        try:
            # In turns, whichever service is ready first: element i is client i % N's next one.
            for client in itertools.cycle(clients):
                yield client.next()
        finally:
            for client in clients:
                client.end()

    ds = tf.data.Dataset.from_generator(elements, output_signature=known["spec"][1])
    # A private pool of two threads: the generator blocks one of them while it waits for a service.
    # The reading from services needs TensorFlow's common threads, which so stay free.
    return finish(ds, 2, prefetch, None)


class _Client:
    """Reads one service's elements, in a thread of its own.

    A call that reads from a service which is gone never returns, so it cannot be made by the thread
    that notices this.
    """

    def __init__(self, address: str, ask: Callable, *, begin: int, stride: int, timeout: float):
        self._address, self._ask, self._timeout = address, ask, timeout
        self._number, self._stride = begin, stride  # of the element that is to come next
        # The number of the element at which the service failed last, and how often it did there.
        self._failed, self._failures = -1, 0
        self._results: queue.Queue | None = None  # what the thread has read; None: no thread
        self._ended = threading.Event()  # tells the thread to end
        self._looking = True  # whether the service does not answer, as far as is known
        self._look()

    def _look(self) -> None:
        """Asks the service for all elements from the next one on, if it answers."""
        # Tried before a thread is started: a thread that reads from a service which is gone is
        # never done, and cannot be interrupted either.
        if not _answers(self._address):
            if not self._looking:
                logging.warning("lost %s %s, looking for it", SERVICE, self._address)
            self._looking = True
            return
        self._looking = False
        # One element waits here: services and `finish` prefetch already.
        self._results, self._ended = queue.Queue(maxsize=1), threading.Event()
        arguments = (self._results, self._ended, self._number)
        # Daemon, as a thread that is stuck in a read must not keep the process from ending.
        threading.Thread(target=self._read, args=arguments, daemon=True).start()

    def end(self) -> None:
        """Tells the thread to end, and forgets what it has read."""
        self._ended.set()
        self._results = None

    def _read(self, results: queue.Queue, ended: threading.Event, number: int) -> None:
        # With a timeout, so that a thread whose results are no longer taken sees `ended` and
        # returns.
        def put(result: Any) -> None:
            while not ended.is_set():
                try:
                    return results.put(result, timeout=POLL)
                except queue.Full:
                    continue

        try:
            with tf.device("CPU:0"):
                for i, element in self._ask(self._address, number).as_numpy_iterator():
                    # i counts the service's own elements; the host's numbers are `stride` apart.
                    put((number + int(i) * self._stride, element))
                    if ended.is_set():
                        return
        except Exception as error:  # next() raises it, or asks again
            put(error)

    def next(self) -> dict[str, np.ndarray]:
        """Returns the next element, waiting for it.

        Raises:
          TimeoutError: None came for `timeout` seconds.
          DataError: The service fails to make it, or sent another one.
        """
        # Counted anew for each element: a service that is slow but sends in time is not given up.
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            if self._results is None:
                self._look()
            try:
                if self._results is None:
                    time.sleep(POLL)
                    continue
                result = self._results.get(timeout=POLL)
            except queue.Empty:
                # Nothing came for POLL seconds. A service that still accepts connections is only
                # slow; else its thread is given up, and the next round looks for the service again.
                if not _answers(self._address):
                    self.end()
                continue
            if isinstance(result, Exception):
                self._retry(result)
            elif result[0] != self._number:  # an element is lost with a connection that breaks
                self._retry(ValueError(f"element {result[0]} came instead of {self._number}"))
            else:
                self._number += self._stride
                return result[1]
        raise TimeoutError(
            f"{SERVICE} {self._address} "
            + ("cannot be reached" if self._looking else "sent nothing")
            + f" for {self._timeout:g} s (config.input.service_timeout): start it with "
            "python -m vit_dist.data_service, see its log, or leave it out of config.input.service"
        )

    def _retry(self, error: Exception) -> None:
        """Asks again, as a service that was restarted has forgotten what it was asked.

        Raises:
          DataError: It has failed at this element RETRIES times before.
        """
        self._failures = self._failures + 1 if self._failed == self._number else 1
        self._failed = self._number
        if self._failures > RETRIES:
            raise DataError(f"{SERVICE} {self._address} failed: {message_of(error)}") from error
        logging.warning("%s %s: %s; asking again", SERVICE, self._address, message_of(error))
        self.end()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=POLL):
            return True
    except OSError:
        return False


def find_failure(error: tf.errors.OpError) -> Exception | None:
    """Returns the error that `from_services` raised, found in the error that TensorFlow made of it.

    Returns:
      ConnectionError for a service that is gone, ValueError for one that fails; None for an error
      that has nothing to do with services.
    """
    # from_generator passes on a Python error as text with a traceback, in which the error itself
    # reads "TimeoutError: data service host:port ..." or "DataError: data service ...".
    lines = [line for line in (error.message or "").splitlines() if f"Error: {SERVICE} " in line]
    if not lines:
        return None
    kind, _, text = lines[0].partition(f"Error: {SERVICE} ")
    return (ConnectionError if kind.endswith("Timeout") else ValueError)(f"{SERVICE} {text}")
