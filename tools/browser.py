"""Drives a headless Chromium by its DevTools protocol: opens pages, asks them, photographs them.

Messages go through two pipes (--remote-debugging-pipe), as JSON that ends with a zero byte, so that
no package for WebSockets is needed.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

# Chromium reads messages from file descriptor 3 and writes them to 4; Python cannot choose the
# numbers under which a child gets its descriptors, so this small program does. It goes by way of
# copies from 10 on, since one of the given numbers may itself be 3 or 4.
_LAUNCHER = """
import os, sys
from fcntl import F_DUPFD_CLOEXEC, fcntl
copies = [fcntl(int(number), F_DUPFD_CLOEXEC, 10) for number in sys.argv[1:3]]
os.dup2(copies[0], 3)
os.dup2(copies[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_FLAGS = (
    "--headless",
    "--no-sandbox",  # which containers do not allow
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PAUSE = 0.1  # seconds between two looks at a page


def find_chromium() -> str | None:
    """The path of Chromium or Chrome, or None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A headless Chromium with one page; a context manager.

    Args:
      program: path of Chromium.
      size: (width, height) of the page in pixels.

    Attributes:
      errors: what pages have said on their console as an error, exceptions among them.
    """

    def __init__(self, program: str, *, size: tuple[int, int] = (1400, 1000)):
        self.errors: list[str] = []
        self._answers: dict[int, dict[str, Any]] = {}
        self._last = 0
        self._buffer = b""
        self._session = ""
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [sys.executable, "-c", _LAUNCHER, str(theirs_in), str(theirs_out), program]
        self._process = subprocess.Popen(
            [*command, *_FLAGS, f"--user-data-dir={self._profile.name}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.resize(size)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def call(self, method: str, *, seconds: float = 60.0, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol; returns its result."""
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while number not in self._answers:
            self._read(deadline, method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url: str) -> None:
        """Goes to an address; `wait_for` tells when the page shows what it should."""
        self.call("Page.navigate", url=url)

    def resize(self, size: tuple[int, int], *, scale: float = 1.0) -> None:
        """Makes the page as large as (width, height) pixels."""
        shape = {"width": size[0], "height": size[1], "deviceScaleFactor": scale}
        self.call("Emulation.setDeviceMetricsOverride", **shape, mobile=False)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_for(self, expression: str, *, seconds: float = 60.0, pause: float = _PAUSE) -> Any:
        """Asks again and again until the answer is true; returns the answer.

        Raises:
          TimeoutError: it was not true in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            # While a page is being replaced there is nobody to answer.
            with contextlib.suppress(RuntimeError):
                if found := self.ask(expression):
                    return found
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true after {seconds:.0f} seconds: {expression}")
            # Whatever the page says meanwhile is read; without it this is the pause.
            until = time.monotonic() + pause
            while time.monotonic() < until:
                self._read(until)

    def photograph(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _read(self, deadline: float, waited_for: str = "") -> None:
        """Reads a message, or none until the deadline; then raises if something is waited for."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            if not ready and not waited_for:
                return
            if not ready:
                raise TimeoutError(f"no answer to {waited_for}")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("Chromium has ended")
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        if "id" in message:
            self._answers[message["id"]] = message
        else:
            self._note(message["method"], message["params"])

    def _note(self, event: str, params: dict[str, Any]) -> None:
        """Keeps what is an error."""
        if event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            words = [str(a.get("value", a.get("description"))) for a in params["args"]]
            self.errors.append(" ".join(words))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self.errors.append(f"{entry['text']} ({entry.get('url', 'no address')})")
