"""Lets the hosts of a run compare facts before they begin, and end together with one message.

Hosts whose seed, data, code or checkpoint differ would train together without an error, and nobody
would know what. So they compare these facts first. What ends one host ends all hosts, with the same
message.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from vit_dist.cluster.environment import Cluster
from vit_dist.cluster.line import Line, Message, wait_for
from vit_dist.cluster.preemption import PREEMPTED
from vit_dist.config.errors import ConfigError, HostLostError, UserError

_SHOWN = 3  # differences that a message lists
# First part of a fact's key -> what to do if hosts differ in it.
_REMEDIES = {
    "config": "start all with the same config file and flags",
    "data": "all must read the same files",
    "code": "install the same versions on all",
    "devices": "NCCL hangs unless all have GPUs, equally many each; see CUDA_VISIBLE_DEVICES",
    "checkpoint": "the workdir must be on storage that all of them share",
}


class Meeting:
    """The hosts that have met, and this host's lines to them.

    The chief has a line to each other host, every other host one line to the chief. A host that
    leaves the `with` by an exception tells the others the reason, so that all end with it.

    Attributes:
      cluster: the hosts; None for a run of one host, which has nobody to ask.
      lines: number of a host -> line to it.
    """

    def __init__(self, cluster: Cluster | None, lines: dict[int, Line], *, timeout_seconds: float):
        self.cluster, self.lines = cluster, lines
        self._timeout_seconds = timeout_seconds

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        for line in self.lines.values():
            # The other host may be gone already; 5 s are enough for one that is not.
            with contextlib.suppress(OSError):
                line.send(parting(error), deadline=time.monotonic() + 5)
            line.close()

    @property
    def index(self) -> int:
        """The number of this host; 0 for the chief, and for a host that is alone."""
        return self.cluster.index if self.cluster else 0

    def name(self, index: int) -> str:
        """The name of a host in messages."""
        return self.cluster.name(index) if self.cluster else f"worker {index}"

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Returns once all hosts have called this with equal facts.

        Each host sends a digest of its facts, which is short; only if it differs from the chief's
        are the facts themselves sent.

        Args:
          facts: nested dicts of JSON values, such as {"config": {"seed": 0}, "data": ...}. The
            first key chooses the remedy in the message.

        Raises:
          ConfigError: facts of two hosts differ (names the key, the hosts and both values), or
            another host has left with a ConfigError. The same message on all hosts.
          HostLostError: another host has left for another reason, or has said nothing for
            `timeout_seconds`.
        """
        flat = flatten(facts)
        # Sorted, because another host may have put the same facts together in another order.
        digest = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()
        if self.index:
            self._ask_chief(flat, digest)
        elif self.lines:
            self._judge(flat, digest)

    def gather(self, value: Any, *, chief_seconds: float = 0.0) -> list[Any]:
        """What each host gives, by its number; returns, with the same list, once all have called.

        Args:
          value: what JSON can hold.
          chief_seconds: how much later than the others the chief may call, beside their
            `timeout_seconds`.

        Raises:
          ConfigError: another host has left with a ConfigError.
          HostLostError: another host has left for another reason, has said nothing for
            `timeout_seconds`, or asks for something else, as one with another version may.
        """
        if not self.lines:
            return [value]
        deadline = time.monotonic() + self._timeout_seconds
        if self.index:
            deadline += chief_seconds
            self._send(0, {"mine": value}, deadline)
            answer = self._receive_from([0], deadline, more_seconds=chief_seconds)[0]
            if "all" not in answer:
                raise self._other_version(0, answer)
            return answer["all"]
        answers = self._receive_from(self.lines, deadline)
        for i, answer in sorted(answers.items()):
            if "mine" not in answer:
                raise self._other_version(i, answer)
        # All hosts but the chief have answered, so these are hosts 1, 2, ... without a gap.
        values = [value, *(answers[i]["mine"] for i in sorted(answers))]
        for i in self.lines:
            self._send(i, {"all": values}, deadline)
        return values

    def _ask_chief(self, flat: Message, digest: str) -> None:
        # digest -> "agreed", or "tell", to which the facts are the answer. The chief then finds
        # the difference, and its error arrives as a "left" message, which _receive_from raises.
        deadline = time.monotonic() + self._timeout_seconds
        self._send(0, {"digest": digest}, deadline)
        answer = self._receive_from([0], deadline)[0]
        if "tell" in answer:
            self._send(0, {"facts": flat}, deadline)
            answer = self._receive_from([0], deadline)[0]
        if "agreed" not in answer:
            raise HostLostError(f"{self.name(0)} answered {answer}, which is no agreement")

    def _judge(self, flat: Message, digest: str) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        answers = self._receive_from(self.lines, deadline)
        unlike = [i for i, answer in sorted(answers.items()) if answer.get("digest") != digest]
        for i in unlike:
            self._send(i, {"tell": True}, deadline)
        theirs = self._receive_from(unlike, deadline)
        # The error ends the chief, and leaving the `with` tells it to all other hosts.
        if unlike:
            for i in unlike:
                if "facts" not in theirs[i]:
                    raise HostLostError(f"{self.name(i)} answered {theirs[i]}, which are no facts")
            facts = {i: theirs[i]["facts"] for i in unlike}
            raise ConfigError(self.describe({self.index: flat, **facts}))
        for i in self.lines:
            self._send(i, {"agreed": True}, deadline)

    def describe(self, facts: Mapping[int, Mapping[str, str]]) -> str:
        """The message about the facts (host -> key -> value) in which hosts differ."""
        keys = sorted({key for flat in facts.values() for key in flat})
        parts, remedies = [], []
        for key in keys:
            # Value -> the hosts that have it.
            hosts: dict[str, list[int]] = {}
            for i, flat in facts.items():
                hosts.setdefault(flat.get(key, "absent"), []).append(i)
            if len(hosts) > 1:
                values = (
                    f"{_shorten(value)} on {', '.join(self.name(i) for i in workers)}"
                    for value, workers in hosts.items()
                )
                parts.append(f"{key} is {' but '.join(values)}")
                remedies.append(_REMEDIES.get(key.partition(".")[0], "start all alike"))
        more = f"; and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
        return (
            f"the hosts differ: {'; '.join(parts[:_SHOWN])}{more}. Make them alike "
            f"({'; '.join(dict.fromkeys(remedies))}) and start all again"
        )

    def _send(self, index: int, message: Message, deadline: float) -> None:
        try:
            line = self.lines[index]
            line.send(message, deadline=deadline)
        except OSError as error:
            raise self._lost(index, error) from None

    def _receive_from(
        self, indices: Iterable[int], deadline: float, *, more_seconds: float = 0.0
    ) -> dict[int, Message]:
        """Receives one message from each host, in whichever order they come.

        `more_seconds` is what the deadline allows beside `timeout_seconds`, for the message.
        """
        found: dict[int, Message] = {}
        indices = list(indices)
        while missing := [i for i in indices if i not in found]:
            # What has arrived already is taken first; then wait for any of the missing hosts.
            for i in missing:
                try:
                    message = self.lines[i].next()
                except OSError as error:
                    raise self._lost(i, error) from None
                if message is not None and "left" in message:
                    raise error_of(message, self.name(i))
                if message is not None:
                    found[i] = message
            missing = [i for i in missing if i not in found]
            try:
                if missing:
                    wait_for([self.lines[i] for i in missing], deadline=deadline)
            except TimeoutError as error:
                raise self._lost(missing[0], error, more_seconds) from None
        return found

    def _other_version(self, index: int, answer: Message) -> HostLostError:
        return HostLostError(
            f"{self.name(index)} answered {answer}, which was not asked for: install the same "
            "versions on all hosts"
        )

    def _lost(self, index: int, error: OSError, more_seconds: float = 0.0) -> HostLostError:
        seconds = self._timeout_seconds + more_seconds
        late = isinstance(error, TimeoutError)
        what = f"has said nothing for {seconds:g} s" if late else "is gone without a word"
        return HostLostError(
            f"{self.name(index)} {what}, before the hosts agreed on the run: its own log says why. "
            "Start all of them again"
        )


def parting(error: BaseException | None) -> Message:
    """The last message of a host: why it leaves, and its exit code."""
    if error is None:
        return {"left": "", "code": 0}
    code = 1
    if isinstance(error, UserError):
        code = error.exit_code
    elif isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    return {"left": str(error) or type(error).__name__, "code": code}


def error_of(message: Message, name: str) -> BaseException:
    """The error to raise after another host's `parting` message; `name` is that host's name."""
    # A host with a program of another version may tell no code: then it is an error like others.
    text, code = str(message["left"]), message.get("code")
    if code == PREEMPTED:
        logging.warning("%s was asked to stop: stopping, too", name)
        return SystemExit(PREEMPTED)
    # This message names the hosts itself, and is to be the same on all of them.
    if text.startswith("the hosts differ:"):
        return ConfigError(text)
    if code == ConfigError.exit_code:
        return ConfigError(f"{name} ended: {text}")
    return HostLostError(f"{name} ended: {text or 'without saying why'}")


def flatten(facts: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> value as JSON, of each leaf of nested dicts."""
    return dict(_leaves(facts, ""))


def _leaves(facts: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        # An empty dict is a leaf: else it could not be told from a key that is absent.
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, sort_keys=True, default=str)


def _shorten(value: str) -> str:
    return value if len(value) <= 100 else f"{value[:80]}... ({len(value)} characters)"
