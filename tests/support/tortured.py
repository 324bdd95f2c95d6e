"""A training with faults in it: what `python -m vit_dist.launch --program=...` runs in tests.

The environment says what happens; the package itself knows nothing of it:

    TORTURE_FOLDER  where each fault notes that it has happened, in fired-0, fired-1, ...
    TORTURE_CELLS   JSON: [fault, host, phase] of each start: so many have happened, so that one of
                    them is next. Without it the host waits for files in TORTURE_FOLDER/orders
"""

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path

PHASES = ("compiling", "step", "save", "evaluation")
SAVE_STEPS = 4
_NEVER = threading.Event()
# A fault that hits the whole process comes from a thread, so that it finds the main thread inside
# of TensorFlow: a step takes some hundredths of a second, XLA some tenths.
_DELAYS = {"compiling": 0.3, "step": 0.005, "save": 0.0, "evaluation": 0.005}
# A file with this name and the fault's number tells the other host that the network is cut.
_CUT = "cut"


# what happens


def raise_exception():
    raise RuntimeError("a fault that the test has put here")


def crash():
    ctypes.string_at(0)


def hold_gil():
    """Locks a mutex twice, in a call that keeps Python's lock: no signal ends that."""
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.PyDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


def enter_collective_alone():
    import tensorflow as tf

    with tf.init_scope():  # at once, though a function may just be traced
        tf.raw_ops.CollectiveReduceV2(
            input=tf.zeros(1),
            group_size=2,
            group_key=4711,
            instance_key=4711,
            ordering_token=[],
            merge_op="Add",
            final_op="Id",
        )


def read_for_ever():
    """As a read from storage that does not answer: the system call never returns."""
    path = _folder() / "fifo"
    if not path.exists():
        os.mkfifo(path)
    open(path).close()


def fill_disk():
    """From now on this process can write nothing to any file; pipes are no files."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, most))


def cut_network():
    _cut().touch()  # the other host sees it and turns deaf, too
    turn_deaf()


def turn_deaf():
    """Drops each packet that arrives at this process: its connections and its open ports.

    By a filter of one instruction, "return 0" bytes of the packet, which needs no rights.
    """
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HL", 1, ctypes.addressof(instruction))
    so_attach_filter = 26
    for name in os.listdir("/proc/self/fd"):
        try:
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # no socket
            continue
        with found:
            if found.family in (socket.AF_INET, socket.AF_INET6):
                found.setsockopt(socket.SOL_SOCKET, so_attach_filter, program)


def send(number):
    return lambda: os.kill(os.getpid(), number)


# By a thread of its own, at any moment.
SUDDEN = {
    "native abort": os.abort,
    "SEGV": crash,
    "SIGKILL": send(signal.SIGKILL),
    "SIGSTOP": send(signal.SIGSTOP),
    "SIGTERM": send(signal.SIGTERM),
    "SIGINT": send(signal.SIGINT),
    "HUP": send(signal.SIGHUP),
    "USR1": send(signal.SIGUSR1),
    "GIL held": hold_gil,
    "network cut": cut_network,
    "network cut one way": turn_deaf,
    "disk full": fill_disk,
}
# By the thread whose work is disturbed.
WITHIN = {
    "exception": raise_exception,
    "stuck collective": enter_collective_alone,
    "stuck storage": read_for_ever,
}
# With places of their own.
MISSING, FASTER = "host missing at start", "restart faster than the old chief's save"
FAULTS = (*WITHIN, *SUDDEN, MISSING, FASTER)


# when it happens


def _folder():
    return Path(os.environ["TORTURE_FOLDER"])


def num_fired():
    return len(list(_folder().glob("fired-*")))


# How many faults have happened before this start.
_number = 0


def _cut():
    return _folder() / f"{_CUT}-{_number}"


def _note():
    """Whether the fault of this start has not happened yet; it has from now on."""
    try:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        descriptor = os.open(_folder() / f"fired-{_number}", flags)
    except FileExistsError:
        return False
    os.write(descriptor, str(time.time()).encode())
    os.close(descriptor)
    return True


def _make_fire(fault, phase, *, host):
    """What a hook calls, as often as it likes, where the fault belongs."""

    def fire():
        if not _note():
            return
        if fault in WITHIN:
            WITHIN[fault]()
        elif phase == "save" and host == 0:
            SUDDEN[fault]()  # by the thread that writes the checkpoint
        else:
            _soon(SUDDEN[fault], _DELAYS[phase])

    return fire


def _soon(act, seconds):
    def run():
        _NEVER.wait(seconds)
        act()

    threading.Thread(target=run, daemon=True).start()


def hook_compiling(fire, host):
    """While the step is traced for the first time, or shortly after, which is when XLA compiles."""
    from vit_dist.training import step

    inner = step.as_distribution

    def as_distribution(*args):
        fire()
        return inner(*args)

    step.as_distribution = as_distribution


# So that a start that a step's fault ends has saved, and the watchdog has learned from three calls.
_STEPS_BEFORE = SAVE_STEPS + 2


def hook_step(fire, host, *, after=_STEPS_BEFORE):
    """Before a call of the step, when this start has done so many steps."""
    from vit_dist.run.loop import Loop

    inner = Loop.call

    def call(loop, batches, step, n):
        if step >= loop.first + after:
            fire()
        return inner(loop, batches, step, n)

    Loop.call = call


def hook_save(fire, host):
    """On the chief between the state and its manifest, where a checkpoint is most delicate."""
    from vit_dist.run.loop import Loop
    from vit_dist.training import checkpoint

    inner, write = Loop.save, checkpoint.write_state

    def save(loop, step, tensors):
        fire()
        return inner(loop, step, tensors)

    def write_state(path, arrays):
        sums = write(path, arrays)
        fire()
        return sums

    if host:
        Loop.save = save
    else:
        checkpoint.write_state = write_state


def hook_evaluation(fire, host):
    """Between the first and the second batch; not of one that makes up for one given up."""
    from vit_dist import train

    inner, trained = train.Evaluation.__call__, threading.Event()
    hook_step(trained.set, host, after=2)

    def evaluate(evaluation, split, *, stop):
        def stop_and_fire():
            if trained.is_set():
                fire()
            return stop()

        return inner(evaluation, split, stop=stop_and_fire)

    train.Evaluation.__call__ = evaluate


HOOKS = dict(zip(PHASES, (hook_compiling, hook_step, hook_save, hook_evaluation), strict=True))


def hook_input(fire, phase):
    """Storage is stuck for the input pipeline: its thread never returns from a read."""
    import numpy as np
    import tensorflow as tf

    from vit_dist.data.sources.digits import DemoSource

    inner, armed = DemoSource.fetch, threading.Event()

    def read(_):
        if armed.is_set():
            fire()
        return np.int64(0)

    def fetch(source, indices):
        if source.split != ("train" if phase == "step" else "val"):
            return inner(source, indices)
        with tf.control_dependencies([tf.numpy_function(read, [indices], tf.int64)]):
            return {name: tf.identity(value) for name, value in inner(source, indices).items()}

    DemoSource.fetch = fetch
    hook_step(armed.set, 0, after=_STEPS_BEFORE if phase == "step" else 2)


def _slow_save():
    """The chief takes seconds for a manifest while the other host is gone already."""
    _cut().touch()
    _NEVER.wait(6)


def _watch_for_cut(act):
    def watch():
        while not _cut().exists():
            _NEVER.wait(0.05)
        act()

    threading.Thread(target=watch, daemon=True).start()


def arm(fault, victim, phase, *, host):
    """Puts the fault of this start in its place."""
    if host != victim:
        if fault == "network cut":
            _watch_for_cut(turn_deaf)
        elif fault == FASTER:
            _watch_for_cut(send(signal.SIGKILL))
    elif fault == MISSING:
        _note()
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == FASTER:
        hook_save(lambda: _note() and _slow_save(), host)
    else:
        fire = _make_fire(fault, phase, host=host)
        if fault == "stuck storage" and phase in ("step", "evaluation"):
            hook_input(fire, phase)
        else:
            HOOKS[phase](fire, host)


def obey(host):
    """Waits for orders: FOLDER/orders/NUMBER-HOST-FAULT, each followed by one process, once.

    Each call of the step also takes a while, so that a run of minutes has few steps.
    """
    from vit_dist.run.loop import Loop

    inner, waiting = Loop.call, []

    def call(loop, batches, step, n):
        while waiting:
            WITHIN[waiting.pop()]()
        _NEVER.wait(float(os.environ.get("TORTURE_PAUSE", "0")))
        return inner(loop, batches, step, n)

    Loop.call = call

    def listen():
        while True:
            for path in sorted((_folder() / "orders").glob(f"*-{host}-*")):
                fault = path.name.split("-", 2)[2]
                path.rename(path.parent.parent / f"done-{path.name}")
                if fault in WITHIN:
                    waiting.append(fault)
                else:
                    SUDDEN[fault]()
            _NEVER.wait(0.05)

    threading.Thread(target=listen, daemon=True).start()


def script():
    global _number
    from vit_dist.run import cli

    # isort: split
    from vit_dist import train
    from vit_dist.training import step

    step._PACK_BYTES = 2000  # of bytes of gradients, so that this small network has several packs
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    host, _number = json.loads(os.environ["TF_CONFIG"])["task"]["index"], num_fired()
    cells = json.loads(os.environ.get("TORTURE_CELLS", "[]"))
    if _number < len(cells):
        arm(*cells[_number], host=host)
    elif (_folder() / "orders").exists():
        obey(host)
    train.define_flags()
    cli.run(train.main)


if __name__ == "__main__":
    sys.exit(script())
