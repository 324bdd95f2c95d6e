"""The program behind notices.hidden: copies its input to standard error, except notices.

TensorFlow's notices go to standard output, which is a file that notices.py keeps. This program runs
beside the main process while that imports TensorFlow, so it imports next to nothing itself.
"""

import os
import re
import signal
import sys

# "I0000 00:00:1795.2  24683 cudart_stub.cc:31] text" (absl's log) or
# "2026-11-26 04:20:51.22: I tensorflow/core/util/port.cc:153] text" (TensorFlow's own).
# The suffix tells C++ from Python, whose log looks alike: "I1126 04:20:51.2 24683 train.py:31] x".
_LOGGED = re.compile(
    rb"(?:([IWEF])\d{4} [\d:. ]+|\d{4}-\d\d-\d\d [\d:.]+: ([IWEF]) )([\w./-]+\.(?:cc|cu|h)):\d+\] ?"
)
# Lines without such a head that belong to notices.
_UNLOGGED = (
    b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    b"To enable the following instructions: ",
)
# Warnings and errors that healthy starts print: (file, beginning of the text).
_HARMLESS = (
    (b"computation_placer.cc", b"computation placer already registered"),
    (b"cuda_fft.cc", b"Unable to register cuFFT factory"),
    (b"cuda_dnn.cc", b"Unable to register cuDNN factory"),
    (b"cuda_blas.cc", b"Unable to register cuBLAS factory"),
    (b"common_lib.cc", b"Could not set metric server port"),  # TPU VMs
    (b"py_utils.cc", b"TF-TRT Warning: Could not find TensorRT"),
)
# Errors that say that there is no GPU: worth showing only on a machine that has one.
_NO_GPU = (
    (b"cuda_platform.cc", b"failed call to cuInit"),
    (b"cuda_driver.cc", b"failed call to cuInit"),
)


def is_notice(line: bytes, *, has_gpus: bool) -> bool:
    """Whether a line on standard error is one of TensorFlow's notices.

    Args:
      line: one line.
      has_gpus: whether the machine has GPUs that the process may use; a line that says there is
        none is no notice then.
    """
    found = _LOGGED.match(line)
    if not found:
        return line.startswith(_UNLOGGED)
    severity, file, text = found[1] or found[2], found[3], line[found.end() :]
    known = _HARMLESS if has_gpus else _HARMLESS + _NO_GPU
    return severity == b"I" or any(
        file.endswith(where) and text.startswith(beginning) for where, beginning in known
    )


def _has_gpus() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not os.path.isdir("/dev"):
        return False
    # dxg is how Windows lends its GPUs to Linux.
    return any(name.startswith(("nvidia", "dxg")) for name in os.listdir("/dev"))


def _main() -> None:
    # Ctrl-C and a scheduler's signals reach the whole process group. The filter ignores them: what
    # the main process prints after them has to pass, and the filter ends when the pipe is closed.
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):
        signal.signal(number, signal.SIG_IGN)
    has_gpus = _has_gpus()
    for line in sys.stdin.buffer:
        target = 1 if is_notice(line, has_gpus=has_gpus) else 2
        try:
            while line:
                line = line[os.write(target, line) :]
        except OSError:
            # The reader is gone, or the disk is full. Read on: nobody else empties the pipe, and
            # the program that fills it would wait.
            continue


if __name__ == "__main__":
    _main()
