"""Tries a TPU out in a process of its own, because libtpu crashes or hangs where it cannot start.

A crash ends the process that it is in, without a word that a user could read; and libtpu asks the
metadata server for minutes. What the trial printed is searched for the reason.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile

_SECONDS = 50.0  # with the start of the program all is told within a minute
_REASON = "vit_dist: "  # begins the line in which the trial tells what TensorFlow raised

# As strategy.py does it. TensorFlow's message has its reason behind headings and traceback.
_TRIAL = f"""
import sys
try:
    import tensorflow as tf
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver("local")
    tf.tpu.experimental.initialize_tpu_system(resolver)
    if not tf.config.list_logical_devices("TPU"):
        raise RuntimeError("TensorFlow started, and sees no TPU")
except BaseException as error:
    print("{_REASON}" + " // ".join(str(error).splitlines() or [type(error).__name__]), flush=True)
    sys.exit(1)
"""
# In what libtpu prints, a line with one of these words tells most.
_TELLING = re.compile(
    r"already in use|Non-OK-status|^Status: |Failed to|FAILED_PRECONDITION|metadata|"
    r"RET_CHECK|Check failed|undefined symbol|Permission denied|NOT_FOUND|UNAVAILABLE"
)
# Headings of TensorFlow's errors, names of nodes, and the heads of log lines, which tell nothing.
_HEADING = re.compile(r"Graph execution error|Detected at node|<stack traces")
_NODE = re.compile(r"\{\{.*?\}\}\s*|\s*\[Op:.*|\s*\[\[.*")
_LOG_HEAD = re.compile(
    r"^([IWEF]\d{4} [\d:. ]+ *\d+ [\w./-]+:\d+\] |\d{4}-\d\d-\d\d [\d:.]+: [IWEF] [\w./-]+:\d+\] )"
)
_LONGEST = 200  # characters of a reason


def probe(*, seconds: float = _SECONDS, trial: str = _TRIAL) -> str | None:
    """Starts the TPU of this machine in another process, which ends before this returns.

    Args:
      seconds: after which it is given up.
      trial: the program that is run, with this process's environment.

    Returns:
      Why it does not start, in one line; None if it does.
    """
    # A file, because a pipe would have to be emptied while the trial runs.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-c", trial],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"},
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # libtpu may have started processes of its own, which would keep the TPU.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    if code == 0:
        return None
    if code is None:
        return f"libtpu did not start the TPU within {seconds:g} s{_behind(_telling(text))}"
    if code < 0:
        name = signal.Signals(-code).name
        return f"libtpu crashed while it started the TPU ({name}){_behind(_telling(text))}"
    return reason_of(_reason_line(text)) or f"the trial of the TPU ended with exit code {code}"


def reason_of(text: str) -> str:
    """The line of TensorFlow's message that tells the reason, without headings and node names."""
    for line in text.splitlines():
        told = _NODE.sub("", line).strip()
        if told and not _HEADING.search(told):
            return told[:_LONGEST]
    return ""


def _reason_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith(_REASON)]
    return lines[-1].removeprefix(_REASON).replace(" // ", "\n") if lines else ""


def _telling(text: str) -> str:
    for line in text.splitlines():
        # "RAW: " is how the handler of crashes begins, whose own troubles are of no interest.
        if _TELLING.search(line) and "RAW: " not in line:
            return _LOG_HEAD.sub("", line).strip()[:_LONGEST]
    return ""


def _behind(words: str) -> str:
    return f": {words}" if words else ""
