"""TensorFlow's notices stay off the terminal; every other line arrives, whatever happens."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vit_dist.run import notices
from vit_dist.run.notice_filter import is_notice

ROOT = Path(__file__).resolve().parents[2]
ABSL = "I0000 00:00:1795666851.221825   24683 cudart_stub.cc:31] Could not find cuda drivers"
CUDA = "E0000 00:00:1795666860.925423   24683 cuda_platform.cc:52] failed call to cuInit: INTERNAL"
BEFORE_INIT = (
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR"
)


@pytest.mark.parametrize(
    "line",
    [
        BEFORE_INIT,
        ABSL,
        CUDA,
        "2026-11-26 04:20:51.221825: I tensorflow/core/util/port.cc:153] oneDNN custom operations",
        "2026-11-26 04:20:51.2: E external/local_xla/xla/stream_executor/cuda/cuda_fft.cc:467] "
        "Unable to register cuFFT factory: Attempting to register factory for plugin cuFFT",
        "W0000 00:00:1.3   9 computation_placer.cc:177] computation placer already registered. "
        "Please check linkage and avoid linking the same target more than once.",
        "To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow",
        "I0000 00:00:1.3   9 service.cc:152] XLA service 0x7f initialized for platform Host",
    ],
)
def test_notices_are_known(line):
    assert is_notice(line.encode() + b"\n", has_gpus=False)


@pytest.mark.parametrize(
    "line",
    [
        "I1126 04:20:51.221825 140735 train.py:31] from Python's log, which looks alike",
        "W0000 00:00:1795666851.3   9 gpu_device.cc:2341] Cannot dlopen some GPU libraries.",
        "E0000 00:00:1795666851.3   9 cuda_executor.cc:1228] out of memory",
        "F0000 00:00:1795666851.3   9 tensor.cc:844] Check failed: IsAligned()",
        "2026-11-26 04:20:51.2: E tensorflow/core/framework/op.cc:1] no op",
        "Traceback (most recent call last):",
        "I0000",
        "",
    ],
)
def test_whatever_else_is_no_notice(line):
    assert not is_notice(line.encode() + b"\n", has_gpus=False)


def test_a_gpu_that_does_not_start_is_news():
    assert not is_notice(CUDA.encode(), has_gpus=True)
    assert is_notice(ABSL.encode(), has_gpus=True)


def write(*lines):
    for line in lines:
        os.write(2, line.encode())


def test_lines_pass_and_notices_are_kept(capfd):
    before = notices.notices()
    with notices.hidden():
        write(BEFORE_INIT + "\n", "first\n", ABSL + "\nsecond\n", "no end of line")
    write("\nafter\n")
    assert capfd.readouterr().err == "first\nsecond\nno end of line\nafter\n"
    assert notices.notices().removeprefix(before) == f"{BEFORE_INIT}\n{ABSL}\n"


def test_a_line_passes_at_once(capfd):
    """Not at the end: what is said before a hang says why."""
    with notices.hidden():
        write("now\n")
        shown = ""
        while not shown:
            shown = capfd.readouterr().err
    assert shown == "now\n"


def test_more_than_a_pipe_holds_passes(capfd):
    text = "".join(f"{i:99}\n" for i in range(10_000))
    with notices.hidden():
        write(text)
    assert capfd.readouterr().err == text


def test_an_exception_goes_through(capfd):
    with pytest.raises(KeyError), notices.hidden():
        write(ABSL + "\nshown\n")
        raise KeyError
    assert capfd.readouterr().err == "shown\n"


@pytest.mark.parametrize("how", ["wanted", "no program", "first process of a container"])
def test_everything_shows_where_it_is_wanted_or_cannot_be_hidden(how, monkeypatch, capfd):
    if how == "wanted":
        monkeypatch.setenv(notices.LEVEL_VARIABLE, "0")
    elif how == "no program":
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
    else:
        monkeypatch.setattr(os, "getpid", lambda: 1)
    with notices.hidden():
        write(ABSL + "\n")
    assert capfd.readouterr().err == ABSL + "\n"


def in_python(code, **env):
    """Runs code, after imports, in a process of its own; returns its exit code and both outputs."""
    code = f"import os, signal, sys\nfrom vit_dist.run import notices\n{code}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    for name in ("TF_CPP_MIN_LOG_LEVEL", "CUDA_VISIBLE_DEVICES"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_last_words_of_a_crash_arrive():
    code, _, shown = in_python(f"""
with notices.hidden():
    os.write(2, b"{ABSL}\\n")
    os.write(2, b"F0000 00:00:1.2   9 tensor.cc:844] Check failed: x\\n    and half a li")
    os.abort()
""")
    assert code == -signal.SIGABRT
    assert shown == "F0000 00:00:1.2   9 tensor.cc:844] Check failed: x\n    and half a li"


def test_an_import_that_fails_shows_why():
    code, _, shown = in_python(f"""
with notices.hidden():
    os.write(2, b"{ABSL}\\nlibrary missing\\n")
    import no_such_module
""")
    assert code == 1 and shown.startswith("library missing\nTraceback")
    assert shown.endswith("ModuleNotFoundError: No module named 'no_such_module'\n")


def test_signals_to_the_whole_group_leave_the_filter_alive():
    _, _, shown = in_python("""
os.setpgid(0, 0)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
with notices.hidden():
    os.write(2, b"I0000 00:00:1.2 9 a.cc:1] wait until the filter runs\\n")
    while not notices.notices():
        pass
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.killpg(0, number)
    os.write(2, b"after\\n")
""")
    assert shown == "after\n"


def test_python_writes_past_the_filter():
    """In its order, and to the terminal, where there is one."""
    code, _, shown = in_python("""
with notices.hidden(python_apart=True):
    assert sys.stderr.fileno() != 2
    print("I0000 00:00:1.2   9 a.cc:1] of Python", file=sys.stderr)
print("after", file=sys.stderr)
""")
    assert code == 0 and shown == "I0000 00:00:1.2   9 a.cc:1] of Python\nafter\n"


def test_a_command_starts_in_silence():
    """TensorFlow's import and the first look at devices, as every command has them."""
    code, printed, shown = in_python("""
from vit_dist.run import cli
import tensorflow as tf

def main():
    print(len(tf.constant([1.0, 2.0])), "cudart_stub.cc" in notices.notices())

sys.argv = ["command"]
cli.run(main)
""")
    assert (code, shown) == (0, "") and printed.startswith("2 ")
