"""Signals: all of them save, what is ignored stays so, and a second Ctrl-C does not wait."""

import os
import signal
import threading

import pytest

from tests.support import processes
from tests.support.waiting import wait_for
from vit_dist.cluster.preemption import PREEMPTED, SIGNALS, Preemption

NAMES = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"]


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_noted(name):
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption() as preemption:
        preemption.attach(lambda number: [number, 0])
        assert not preemption.requested() and preemption.received is None
        signal.raise_signal(signal.Signals[name])
        assert preemption.requested() and preemption.noticed and preemption.received == name
        signal.raise_signal(signal.SIGTERM)
        assert preemption.received == name  # the first
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_host_was_asked():
    with Preemption() as preemption:
        preemption.attach(lambda number: [number, 1])
        assert preemption.requested() and not preemption.noticed


@pytest.mark.parametrize("name", NAMES)
def test_before_the_first_step_a_signal_leaves_at_once(name, capfd):
    with Preemption(), pytest.raises((SystemExit, KeyboardInterrupt)) as error:
        signal.raise_signal(signal.Signals[name])
    if name == "SIGINT":
        assert error.type is KeyboardInterrupt
    else:
        assert error.value.code == PREEMPTED
        said = f"stopped by {name} before the first step; run the same command again\n"
        assert capfd.readouterr().err == said


@pytest.mark.parametrize("name", NAMES)
def test_an_ignored_signal_stays_ignored(name):
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            preemption.attach(lambda number: [number])
            signal.raise_signal(number)
            assert not preemption.requested()
            assert signal.getsignal(number) is signal.SIG_IGN
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_elsewhere_than_in_the_main_thread_nothing_is_touched(caplog):
    before = [signal.getsignal(number) for number in SIGNALS]
    found = []

    def run():
        with Preemption() as preemption:
            preemption.attach(lambda number: [number])
            found.append(preemption.requested())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
    assert "not in the main thread" in caplog.text
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_it_leaves_no_thread_and_no_file_behind():
    def count():
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        with Preemption():
            pass
    wait_for(lambda: count() == before)
    assert signal.set_wakeup_fd(-1) == -1


# a process that is inside of a call of TensorFlow


def wait_in_tensorflow():
    import tensorflow as tf

    with Preemption() as preemption:
        preemption.attach(lambda number: [number])
        dataset = tf.data.Dataset.range(1).shuffle(2).repeat().filter(lambda x: x < 0)
        print("waiting", flush=True)
        next(iter(dataset))  # never comes


def test_a_second_interrupt_ends_at_once_inside_of_tensorflow(tmp_path):
    with processes.Call(wait_in_tensorflow, log=tmp_path / "log") as process:
        process.wait_for(lambda: "waiting" in process.text())
        pressed = 0

        def press():
            # Once again and again, since two that come too close to each other count as one.
            nonlocal pressed
            pressed += 1
            os.kill(process.pid, signal.SIGINT)
            return not process.is_alive(0.3)

        wait_for(press)
        assert process.wait() == 130 and pressed >= 2
        assert process.text().endswith("interrupted\n") and "Traceback" not in process.text()


def test_one_press_that_comes_twice_is_one(tmp_path):
    with processes.Call(wait_in_tensorflow, log=tmp_path / "log") as process:
        process.wait_for(lambda: "waiting" in process.text())
        for _ in range(2):
            os.kill(process.pid, signal.SIGINT)
        assert process.is_alive(1.0)
