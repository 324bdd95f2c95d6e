"""Checks with a verdict, one line each, which all hosts of a run make together."""

import os
import threading
from collections.abc import Callable, Sequence

import tensorflow as tf

from vit_dist.cluster import gpus
from vit_dist.cluster.agreement import Meeting
from vit_dist.config.errors import UserError
from vit_dist.storage.errors import cause


class WrongError(UserError):
    """What a check finds to be wrong, with the remedy."""


class Examination:
    """Makes checks, prints their verdicts, and keeps the lines.

    Attributes:
      meeting: the hosts that make each check together; a meeting of one host at first.
      lines: what was printed.
      wrong: names of the checks that failed on some host, or were left out.

    Args:
      seconds: how long a check may take; the process ends at one that hangs.
      show: takes each line.
    """

    def __init__(self, *, seconds: float, show: Callable[[str], None] = print):
        self.meeting = Meeting(None, {}, timeout_seconds=seconds)
        self.lines: list[str] = []
        self.wrong: list[str] = []
        self._seconds, self._show = seconds, show
        self._lost = False  # a host has left

    def check(self, name: str, find: Callable[[], str], *, needs: Sequence[str] = ()) -> bool:
        """Makes a check; returns whether all is well on all hosts.

        Args:
          name: of the check.
          find: returns what is to be said where all is well; raises what is wrong.
          needs: checks without which this one would fail or hang; it is left out if they failed.
        """
        missing = [other for other in needs if other in self.wrong]
        missing += ["all hosts"] if self._lost else []
        if missing:
            self._say(name, "not checked", f"it needs {', '.join(missing)}")
            self.wrong.append(name)
            return False
        # Hosts that wait for each other in a collective wait for ever, deaf to signals.
        timer = threading.Timer(self._seconds, self._give_up, (name,))
        timer.daemon = True
        timer.start()
        try:
            mine = _verdict(find)
            # The lines between hosts still work where a collective does not. A host that has left
            # is a verdict of its own.
            found = self.meeting.gather(mine)
        except UserError as error:
            found, self._lost = [("WRONG", str(error))], True
        finally:
            timer.cancel()
        bad = [(i, text) for i, (word, text) in enumerate(found) if word != "ok"]
        if not bad:
            self._say(name, "ok", found[0][1])
            return True
        self.wrong.append(name)
        for i, text in bad:
            self._say(name, "WRONG", f"{self.meeting.name(i)}: {text}" if len(found) > 1 else text)
        return False

    def _say(self, name: str, word: str, text: str) -> None:
        line = f"{name:<12}{word:<12}{text}"
        self.lines.append(line)
        self._show(line)

    def _give_up(self, name: str) -> None:
        self._say(name, "WRONG", f"no end after {self._seconds:g} s; see the logs of all hosts")
        os._exit(1)


def _verdict(find: Callable[[], str]) -> tuple[str, str]:
    try:
        return "ok", find()
    except UserError as error:
        return "WRONG", str(error)
    # Whatever a device, driver or library raises is a finding: the checks after it go on.
    except Exception as error:
        text = cause(error)
        said = gpus.explain(str(error))
        if said is None and isinstance(error, tf.errors.OpError):
            said = type(error).__name__
        return "WRONG", f"{said or type(error).__name__} ({text})"
