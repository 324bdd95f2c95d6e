"""Waiting for what happens in another thread or process."""

import threading
import time

_NEVER = threading.Event()


def wait_for(condition, seconds=60, *, alive=lambda: True):
    """Returns what `condition` returns once that is true.

    Args:
      condition: is called again and again.
      seconds: how long; then the test fails.
      alive: whether there is still something to wait for; else the test fails at once.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert alive(), "ended without what was waited for"
        assert time.monotonic() < deadline, f"waited {seconds} seconds in vain"
        pause(0.02)
    return found


def pause(seconds):
    """For things that are to take long. To wait for something, wait_for() is more certain."""
    _NEVER.wait(seconds)
