"""One workdir, one run: who holds the lock, who takes it over, and who is told."""

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import threading

import pytest

from tests.support import processes
from vit_dist.config.errors import ConfigError, StorageError
from vit_dist.storage import lock as lock_module
from vit_dist.storage import lock_files, owner
from vit_dist.storage.lock import LOCK_FILE, WorkdirLock


class Holder:
    """Another process that holds the lock until it is told, or killed."""

    def __init__(self, workdir, *, with_child=False):
        self._told, telling = multiprocessing.Pipe()
        self.process = processes.start(hold, workdir, telling, with_child)
        self.pid = self.process.pid
        assert self._told.recv() == "held"

    def kill(self):
        self.process.kill()
        self.process.join()

    def end(self):
        self._told.send("end")
        self.process.join()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.kill()


def hold(workdir, pipe, with_child):
    with WorkdirLock(workdir):
        if with_child and not os.fork():
            pipe.recv()  # until the test's end of the pipe is closed
            os._exit(0)
        pipe.send("held")
        pipe.recv()


@pytest.fixture(autouse=True)
def time_flies(monkeypatch):
    """Nothing waits; returns what was waited for, to which a test may add what happens then."""
    waits = []
    monkeypatch.setattr(lock_module.time, "sleep", waits.append)
    return waits


@pytest.fixture(params=["flock", "no flock"])
def any_disk(request, monkeypatch):
    """File systems that can lock, and those that cannot."""
    if request.param == "no flock":

        def unsupported(*args):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(fcntl, "flock", unsupported)
    return request.param


def write_lock(workdir, **changed):
    """The lock of this process but for what is changed."""
    held = dataclasses.replace(owner.this_process(), **changed)
    workdir.mkdir(exist_ok=True)
    (workdir / LOCK_FILE).write_bytes(held.to_bytes())
    return held


def test_held_and_released(tmp_path, any_disk):
    with WorkdirLock(tmp_path / "new" / "run"):
        said = json.loads((tmp_path / "new" / "run" / LOCK_FILE).read_text())
        assert said["pid"] == os.getpid() and said["host"]
    assert not (tmp_path / "new" / "run" / LOCK_FILE).exists()
    with WorkdirLock(tmp_path / "new" / "run"):
        pass


def test_a_second_start_is_told_who_has_it(tmp_path, any_disk):
    with Holder(tmp_path) as holder:
        since = json.loads((tmp_path / LOCK_FILE).read_text())["since"]
        with pytest.raises(ConfigError) as error, WorkdirLock(tmp_path):
            pass
        for words in (
            str(tmp_path),
            f"process {holder.pid} on",
            f"since {since}",
            "--workdir",
        ):
            assert words in str(error.value)
        assert error.value.exit_code == 2
        # Nothing was changed for the holder, which is still told apart at the next start.
        with pytest.raises(ConfigError), WorkdirLock(tmp_path):
            pass
        holder.end()
    with WorkdirLock(tmp_path):
        pass


def test_within_one_process(tmp_path, any_disk):
    """A notebook that starts the same run in two cells, and one that starts it again."""
    with WorkdirLock(tmp_path), pytest.raises(ConfigError), WorkdirLock(tmp_path):
        pass
    with pytest.raises(KeyError), WorkdirLock(tmp_path):
        raise KeyError
    with WorkdirLock(tmp_path):
        pass


def test_a_killed_holder_blocks_nobody(tmp_path, any_disk, time_flies):
    with Holder(tmp_path) as holder:
        holder.kill()
        assert (tmp_path / LOCK_FILE).exists()
        with WorkdirLock(tmp_path):
            assert sum(time_flies) <= lock_files.SETTLE_SECONDS
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_killed_holder_whose_child_lives_on(tmp_path):
    """The child has the file open, so the kernel still takes it for locked."""
    with Holder(tmp_path, with_child=True) as holder:
        holder.kill()
        with WorkdirLock(tmp_path), pytest.raises(ConfigError), WorkdirLock(tmp_path):
            pass


@pytest.mark.parametrize(
    "changed",
    [
        {"started": "1"},  # the number was given to this process since
        {"pid": 2**22 + 1},  # larger than any
    ],
)
def test_numbers_of_processes_repeat(tmp_path, any_disk, changed):
    write_lock(tmp_path, **changed)
    with WorkdirLock(tmp_path):
        pass


def test_another_container_of_this_machine_that_is_gone(tmp_path, time_flies):
    """Its process numbers say nothing here, but the kernel, which is one, knows."""
    write_lock(tmp_path, namespace="pid:[1]", host="container")
    with WorkdirLock(tmp_path):
        assert time_flies == []


def test_an_empty_or_damaged_file_is_no_lock(tmp_path, any_disk):
    for content in (b"", b"{", b"[]", b'{"pid": 1}', b"\xff\x00"):
        (tmp_path / LOCK_FILE).write_bytes(content)
        with WorkdirLock(tmp_path):
            pass


def test_a_holder_on_another_machine_that_lives(tmp_path, any_disk, monkeypatch):
    held = write_lock(tmp_path, boot="another", host="node7", pid=77)

    def beats(seconds):
        os.utime(tmp_path / LOCK_FILE, (2e9, 2e9))

    monkeypatch.setattr(lock_module.time, "sleep", beats)
    with pytest.raises(ConfigError, match="in use by process 77 on node7"), WorkdirLock(tmp_path):
        pass
    assert owner.parse_owner((tmp_path / LOCK_FILE).read_bytes()) == held


def test_a_holder_on_another_machine_that_is_gone(tmp_path, any_disk, time_flies, caplog):
    write_lock(tmp_path, boot="another", host="node7", pid=77)
    with WorkdirLock(tmp_path):
        assert owner.parse_owner((tmp_path / LOCK_FILE).read_bytes()).pid == os.getpid()
    waited = sum(time_flies) - (any_disk == "no flock") * lock_files.SETTLE_SECONDS
    assert waited == pytest.approx(lock_module.STALE_SECONDS, abs=2 * lock_module.POLL_SECONDS)
    assert "was locked by process 77 on node7" in caplog.text
    assert "taking over" in caplog.text


def test_one_that_has_been_gone_for_long_is_not_waited_for(tmp_path, time_flies):
    write_lock(tmp_path, boot="another")
    os.utime(tmp_path / LOCK_FILE, (1e9, 1e9))
    with WorkdirLock(tmp_path):
        assert time_flies == []


def test_one_that_ends_while_it_is_watched(tmp_path, any_disk, monkeypatch):
    write_lock(tmp_path, boot="another")

    def ends(seconds):
        (tmp_path / LOCK_FILE).unlink(missing_ok=True)
        monkeypatch.undo()

    monkeypatch.setattr(lock_module.time, "sleep", ends)
    with WorkdirLock(tmp_path):
        assert owner.parse_owner((tmp_path / LOCK_FILE).read_bytes()).pid == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_beat_shows_that_the_holder_lives(tmp_path, any_disk):
    with WorkdirLock(tmp_path) as lock:
        os.utime(tmp_path / LOCK_FILE, (1e9, 1e9))
        before = lock._file.beat()
        lock.beat()
        assert lock._file.beat() != before and lock._file.age() < 60
        lock.check()


def test_it_beats_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.001)
    beaten = threading.Event()
    monkeypatch.setattr(WorkdirLock, "beat", lambda self: beaten.set())
    with WorkdirLock(tmp_path):
        assert beaten.wait(30)


def test_who_was_taken_over_saves_nothing_more(tmp_path, any_disk):
    with WorkdirLock(tmp_path) as lock:
        lock.check()
        (tmp_path / LOCK_FILE).unlink()
        lock.beat()
        lock.check()  # the file is gone, but nobody has taken its place
        other = write_lock(tmp_path, host="node7", token="another")
        lock.beat()
        with pytest.raises(StorageError, match=r"taken over by process .* on node7"):
            lock.check()
    # Leaving does not remove what is another's.
    assert owner.parse_owner((tmp_path / LOCK_FILE).read_bytes()) == other


def test_other_hosts_hold_nothing(tmp_path):
    with WorkdirLock(tmp_path / "run", active=False) as lock:
        lock.check()
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to the workdir .*file/run \(Not a dir"):
        WorkdirLock(tmp_path / "file" / "run").__enter__()


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with WorkdirLock("~/run"):
        assert (tmp_path / "run" / LOCK_FILE).exists()


# in a bucket


def test_in_a_bucket(remote, time_flies):
    with WorkdirLock(remote / "run"):
        assert (remote / "run" / LOCK_FILE).exists()
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on"):
            WorkdirLock(remote / "run").__enter__()
    assert not (remote / "run" / LOCK_FILE).exists()


def test_in_a_bucket_a_killed_process_of_this_machine_blocks_nobody(remote, time_flies):
    held = dataclasses.replace(owner.this_process(), started="1")
    (remote / LOCK_FILE).write_bytes(held.to_bytes())
    with WorkdirLock(remote):
        assert sum(time_flies) <= lock_files.SETTLE_SECONDS


@pytest.mark.parametrize("lives", [False, True])
def test_in_a_bucket_another_machine_is_watched(remote, monkeypatch, lives):
    held = dataclasses.replace(owner.this_process(), boot="another", host="node7")
    (remote / LOCK_FILE).write_bytes(held.to_bytes())
    waited = []

    def pause(seconds):
        waited.append(seconds)
        if lives:
            (remote / LOCK_FILE).write_bytes(held.renewed().to_bytes())

    monkeypatch.setattr(lock_module.time, "sleep", pause)
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 5.0)
    lock = WorkdirLock(remote)
    if lives:
        with pytest.raises(ConfigError, match=r"in use by process .* on node7"):
            lock.__enter__()
    else:
        with lock:
            assert sum(waited) >= lock_module.STALE_SECONDS
            lock.beat()
            lock.check()


def test_in_a_bucket_two_at_the_same_time(remote, monkeypatch):
    """Who is overwritten before it looks again gives way."""
    other = dataclasses.replace(owner.this_process(), boot="another", host="node7")

    def pause(seconds):
        nonlocal other
        other = other.renewed()
        (remote / LOCK_FILE).write_bytes(other.to_bytes())

    monkeypatch.setattr(lock_module.time, "sleep", pause)
    with pytest.raises(ConfigError, match=r"in use by process .* on node7"):
        WorkdirLock(remote).__enter__()
