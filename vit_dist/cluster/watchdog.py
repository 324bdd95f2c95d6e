"""Notices that a run stands still, and which of its hosts keeps the others waiting.

TensorFlow ends a collective when another process dies or is stopped. It waits without end for one
that is alive and stuck: in a read from storage, in a GPU's kernel, behind Python's lock. So each
host tells the chief every second how far it has got, over the line of their meeting, and the chief
tells all hosts what it knows. One thread does this, however many steps there are. A run of one host
is watched as well: its storage or its device can hang, too.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from vit_dist.cluster.agreement import Meeting
from vit_dist.cluster.line import Message

BEAT_SECONDS = 1.0

_FACTOR = 10.0  # a stretch of work may take so many times the longest of its kind so far
# The first stretch of a kind compiles, and is no measure; nor are two.
_SAMPLES = 3

_SILENT_SECONDS = 5.0  # a host that has missed so many beats is called silent in messages
_REARM_SECONDS = 30.0


class Limits:
    """How long each kind of work may take on this host, learned from how long it took.

    Args:
      timeout_seconds: the most that is ever allowed once there is something to learn from; before,
        it takes effect only if it is longer than `patience_seconds`.
      patience_seconds: what is always allowed, so that the first stretch can compile, and storage
        can come back: TensorFlow's bucket client alone tries again for some minutes.
    """

    def __init__(self, timeout_seconds: float, patience_seconds: float = 600.0):
        self._timeout_seconds, self._patience_seconds = timeout_seconds, patience_seconds
        self._counts: dict[str, int] = {}
        self._slowest: dict[str, float] = {}

    @property
    def first(self) -> float:
        """Seconds for work of which nothing is known yet."""
        return max(self._timeout_seconds, self._patience_seconds)

    def note(self, doing: str, seconds: float) -> None:
        """Takes the length of one stretch of work into account."""
        self._counts[doing] = count = self._counts.get(doing, 0) + 1
        if count > 1:
            self._slowest[doing] = max(self._slowest.get(doing, 0.0), seconds)

    def of(self, doing: str) -> float:
        """Seconds that the next stretch may take."""
        if self._counts.get(doing, 0) < _SAMPLES:
            return self.first
        learned = max(_FACTOR * self._slowest[doing], self._patience_seconds)
        return min(learned, self._timeout_seconds)


class State(NamedTuple):
    """What is known of a host. Times are seconds ago, since the clocks of hosts differ."""

    turns: int = 0  # stretches of work that it has begun
    step: int = 0
    doing: str = "start"
    waiting: float = 0.0  # since it began this stretch
    limit: float = float("inf")  # longer than that, and it stands still
    silent: float = 0.0  # since its watchdog was heard
    end: str | None = None  # why it left, "" where the run was over; None: it is there

    @property
    def stands_still(self) -> bool:
        return bool(self.end) or max(self.waiting, self.silent) > self.limit

    def aged(self, seconds: float) -> "State":
        """The same host, not heard for some more seconds."""
        return self._replace(waiting=self.waiting + seconds, silent=self.silent + seconds)


def find_stuck(states: Sequence[State]) -> list[int] | None:
    """The hosts that keep a run waiting, if all of it stands still.

    One host's long save lets the others wait beyond their own limits. So nothing is stuck as long
    as one of the hosts is within its limit.

    Returns:
      None if some host gets on. Else the numbers of the first kind that there is: hosts that are
      gone; that are silent; that have begun fewer turns than others. Nobody, if all have come
      equally far.
    """
    there = {i: state for i, state in enumerate(states) if state.end != ""}
    if not there or not all(state.stands_still for state in there.values()):
        return None
    most = max(state.turns for state in there.values())
    gone = [i for i, state in there.items() if state.end]
    silent = [i for i, state in there.items() if state.silent > _SILENT_SECONDS]
    return gone or silent or [i for i, state in there.items() if state.turns < most]


class Watchdog:
    """Watches over a run from within a `with`.

    A run of one host in an interactive Python, such as a notebook, is not watched: a person sits
    there, who may look at it in a debugger for an hour.

    Args:
      meeting: the hosts and the lines between them, which the watchdog's thread uses from now on.
      timeout_seconds, patience_seconds: see Limits.
    """

    def __init__(
        self, meeting: Meeting, *, timeout_seconds: float, patience_seconds: float = 600.0
    ):
        self._meeting, self._timeout_seconds = meeting, timeout_seconds
        self._limits = Limits(timeout_seconds, patience_seconds)
        count = len(meeting.cluster.workers) if meeting.cluster else 1
        # Of each host what was told last, and when by this host's clock. This host's own is
        # written by the main thread, the others' by the watchdog's; each entry as a whole.
        now = time.monotonic()
        self._told = [(State(limit=self._limits.first), now) for _ in range(count)]
        # When a time ended in which this process was stopped (Ctrl-Z, a machine put to sleep), and
        # how long it was: the run did not stand still in it.
        self._pauses: list[tuple[float, float]] = []
        self._lock = threading.Lock()  # of the lines
        self._over = threading.Event()
        self._armed = False  # faulthandler's timer is ours
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._meeting.lines or not hasattr(sys, "ps1"):
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._armed:  # and no other's, such as that of a test runner
            faulthandler.cancel_dump_traceback_later()

    def progress(self, step: int, doing: str = "train") -> None:
        """Tells that this host has got to `step` and begins a new stretch of work.

        All hosts call it from their main thread at the same places: before each call of the
        training step, each batch of an evaluation, each save. What lies between two calls is one
        stretch. A host that begins fewer of them than others is the one that they wait for.

        Args:
          step: the optimizer step.
          doing: what the stretch is, for messages; each kind has a limit of its own.
        """
        before, since = self._told[self._meeting.index]
        now = time.monotonic()
        self._limits.note(before.doing, now - since)
        state = State(before.turns + 1, step, doing, limit=self._limits.of(doing))
        self._told[self._meeting.index] = (state, now)

    def lost(self, seconds: float = 5.0) -> str | None:
        """Which host is to blame for an error in a collective, and why.

        Args:
          seconds: how long to wait for news of a host that is leaving just now.

        Returns:
          Words such as "worker 1 (b:2222) ended: no space left on device"; None if all hosts still
          answer, or there is one host only.
        """
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                self._hear()
            states = self._states()
            over = any(state.end is not None for state in states)
            if over or not self._meeting.lines or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        ended = [i for i, state in enumerate(states) if state.end]
        silent = [i for i, state in enumerate(states) if state.silent > _SILENT_SECONDS]
        blamed = [self._describe(i, states[i]) for i in ended or silent]
        return "; ".join(blamed) or None

    def _states(self) -> list[State]:
        """All hosts' as of now."""
        now = time.monotonic()
        states = [state.aged(now - when) for state, when in self._told]
        own, since = self._meeting.index, self._told[self._meeting.index][1]
        paused = sum(length for end, length in self._pauses if end > since)
        waiting = max(states[own].waiting - paused, 0.0)
        states[own] = states[own]._replace(waiting=waiting, silent=0.0)
        return states

    def _watch(self) -> None:
        armed, beat = 0.0, time.monotonic()
        while not self._over.wait(BEAT_SECONDS):
            now = time.monotonic()
            # A beat that is so late: the process did not run meanwhile, or hardly.
            if now - beat > _SILENT_SECONDS:
                # A pause before the present stretch counts no more; a run of weeks has many.
                since = self._told[self._meeting.index][1]
                self._pauses = [p for p in self._pauses if p[0] > since] + [(now, now - beat)]
            beat = now
            # Should this thread itself be kept from running, because something holds Python's
            # lock, a C thread of faulthandler ends the process; it is set back again and again. Not
            # on a host that is alone: after Ctrl-Z for that long, it would end what goes on.
            if self._meeting.lines and now - armed > _REARM_SECONDS:
                faulthandler.dump_traceback_later(self._limits.first + 60, exit=True, file=2)
                self._armed, armed = True, now
            with self._lock:
                verdict = self._hear()
                states = self._states()
                stuck = find_stuck(states)
                if verdict is None and stuck is not None:
                    verdict = self._message(stuck, states)
                    self._tell({"stuck": verdict})
                # The chief hears every host; the others hear of each other from the chief.
                chief = self._meeting.index == 0
                self._tell({"states": states} if chief else {"state": states[self._meeting.index]})
            if verdict is not None:
                leave(verdict)

    def _hear(self) -> str | None:
        """Takes in what has come; returns the message of a host that found the run to be stuck."""
        verdict = None
        for i, line in self._meeting.lines.items():
            try:
                # After its last words a host hangs up, and is not asked any more.
                while self._told[i][0].end is None and (message := line.next()) is not None:
                    verdict = message.get("stuck", verdict)
                    self._take(i, message)
            except (OSError, ValueError) as error:
                logging.warning("%s: %s", self._meeting.name(i), error)
                state, when = self._told[i]
                self._told[i] = (state._replace(end="its process is gone"), when)
        return verdict

    def _take(self, i: int, message: Message) -> None:
        now = time.monotonic()
        if "left" in message:
            state, when = self._told[i]
            self._told[i] = (state._replace(end=str(message["left"])), when)
        elif "state" in message:
            self._told[i] = (State(*message["state"]), now)
        elif "states" in message:
            for j, state in enumerate(message["states"]):
                if j != self._meeting.index:
                    self._told[j] = (State(*state), now)

    def _tell(self, message: Message) -> None:
        for i, line in self._meeting.lines.items():
            if self._told[i][0].end is None:
                # Whether a host is gone shows when it is heard, along with its last words.
                with contextlib.suppress(OSError):
                    line.offer(message)

    def _message(self, stuck: Sequence[int], states: Sequence[State]) -> str:
        own = states[self._meeting.index]
        behind = "; ".join(self._describe(i, states[i]) for i in stuck)
        rest = [i for i in range(len(states)) if i not in stuck and states[i].end is None]
        others = "; ".join(self._describe(i, states[i]) for i in rest)
        what = f"behind is {behind}; waiting: {others}"
        logs, again = "Each host's log shows", "Start all again, and they go on"
        if len(states) == 1:
            what = f"the input, the storage or a device hangs in {own.doing}"
            logs, again = "Above you see", "Start it again, and it goes on"
        elif not stuck:
            what = f"none is behind, so the input, a device or the network hangs: {others}"
        return (
            f"the run has stood still at step {own.step} for {own.waiting:.0f} s: {what}. {logs} "
            f"where its threads are. {again} from the newest checkpoint; if the wait was no fault, "
            f"raise strategy.timeout_seconds ({self._timeout_seconds:g})"
        )

    def _describe(self, i: int, state: State) -> str:
        name = self._meeting.name(i)
        if state.end:
            return f"{name} ended: {state.end}"
        silent = f"silent for {state.silent:.0f} s, last " if state.silent > _SILENT_SECONDS else ""
        return f"{name}, {silent}at step {state.step} in {state.doing} for {state.waiting:.0f} s"


def leave(text: str) -> None:
    """Ends the process, past a main thread that hangs; shows where all threads are."""
    os.write(2, b"where the threads of this process are:\n")
    faulthandler.dump_traceback(file=2, all_threads=True)
    os.write(2, f"error: {text}\n".encode())
    os._exit(1)
