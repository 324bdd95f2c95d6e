"""A thread that makes pictures beside a training: nothing that goes wrong in it ends a run."""

import collections
import threading
import time
from collections.abc import Callable

import tensorflow as tf

# How long the end of a run waits for a picture to notice that it is given up. That takes a block of
# the network or a figure, a second or two; more only if reading the images hangs.
_LAST_SECONDS = 30.0
# How long the end of a run waits for pictures at all. A storage that hangs while their images are
# read must not hold up a run that is done.
PATIENCE = 600.0


class _GivenUpError(Exception):
    """The run ends, and nobody waits for the picture."""


class Background:
    """Runs functions one after the other, in a thread of its own.

    One thread for all pictures, because matplotlib is not made for several. Of each kind of
    picture the first failure is told, and the next picture is tried as usual.

    Args:
      note: tells the user a line; called by the thread that trains.
    """

    def __init__(self, *, note: Callable[..., None]):
        self._note = note
        self._lock = threading.Lock()
        # Functions that wait, each with what it draws.
        self._waiting: collections.deque[tuple[str, Callable[[], None]]] = collections.deque()
        self._thread: threading.Thread | None = None
        self._running = False
        self._given_up = threading.Event()
        # What could not be drawn -> why, and which of that has been told.
        self._failures: dict[str, Exception] = {}
        self._told: set[str] = set()

    def start(self, what: str, draw: Callable[[], None]) -> None:
        """Lets the thread call a function.

        Args:
          what: that is drawn, for the message if it fails.
          draw: it calls `go_on` now and then.
        """
        self.tell()
        with self._lock:
            self._waiting.append((what, draw))
            if self._running:
                return
            self._running = True
            # A daemon: a process that ends does not wait for it longer than `close` does.
            self._thread = threading.Thread(target=self._run, name="figures", daemon=True)
            self._thread.start()

    def go_on(self) -> None:
        """Called now and then in the thread; raises where the pictures are given up."""
        if self._given_up.is_set():
            raise _GivenUpError

    def finish(self, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Waits until all is drawn, or until `stop` is true, or for PATIENCE seconds."""
        deadline = time.monotonic() + PATIENCE
        while self._thread is not None and self._thread.is_alive() and not stop():
            self._thread.join(0.1)
            if time.monotonic() > deadline:
                self._note(f"warning: pictures are given up: not drawn in {PATIENCE:.0f} seconds")
                self._given_up.set()
                break
        self.tell()

    def close(self) -> None:
        """Gives up what is being drawn, and what waits.

        A thread that were still in TensorFlow when Python ends could take the exit code with it.
        """
        self._given_up.set()
        if self._thread is not None:
            self._thread.join(_LAST_SECONDS)

    def tell(self) -> None:
        """Tells what has failed since it was called last."""
        for what in [w for w in self._failures if w not in self._told]:
            self._told.add(what)
            failure = self._failures[what]
            text = f"{type(failure).__name__}: {failure}".splitlines()[0]
            self._note(f"warning: {what} could not be drawn ({text}); the training goes on")

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._given_up.is_set():
                    self._running = False
                    return
                what, draw = self._waiting.popleft()
            try:
                # On the CPU, beside whatever trains on an accelerator.
                with tf.device("CPU:0"):
                    draw()
            except _GivenUpError:
                continue
            # Of any kind, since a picture is not worth a run; `tell` says it in the other thread.
            except Exception as error:
                self._failures.setdefault(what, error)
