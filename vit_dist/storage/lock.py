"""One run, one workdir: a lock file that names the process which writes there.

    <workdir>/lock.json    host, process and since when; made at the start, removed at the end

A second start says who holds the workdir, and ends. A dead holder's lock is taken over. How far
this holds depends on the storage:

- A disk: always. The kernel locks the file (flock) for the holder and unlocks it when that process
  ends, however it ends: a run that was killed can be started again the next moment, and containers
  that share the folder on one machine see each other.
- NFS: within one machine as on a disk. Between machines flock works where the mount passes it on
  (NFSv4; not with the options local_lock and nolock). Besides, a holder renews the file's time
  every BEAT_SECONDS. Another machine takes the lock over only once that time has stood still for
  STALE_SECONDS. So a run whose machine was lost waits up to that long when it starts elsewhere.
- A bucket: best effort. TensorFlow's file systems have neither locks nor exclusive creation, so the
  object is written, and read again a second later. A holder on the same machine is judged by its
  process number, one on another machine by its renewals, as above. Two starts within about a second
  can both go on; the one whose object was overwritten finds out within BEAT_SECONDS, and `check`
  then ends it.
"""

import threading
import time

from absl import logging
from etils import epath

from vit_dist.config.errors import ConfigError, StorageError
from vit_dist.paths import expand
from vit_dist.storage.errors import FAILURES, Kind, cause, explain, kind_of, only_warn, retry
from vit_dist.storage.files import make_folder
from vit_dist.storage.lock_files import Locking, lock_file
from vit_dist.storage.owner import Owner, is_alive, this_process

LOCK_FILE = "lock.json"
# A holder renews its lock once in BEAT_SECONDS. It counts as dead after six beats without renewal:
# NFS may show the time of a file up to 60 s late.
BEAT_SECONDS = 15.0
STALE_SECONDS = 90.0
POLL_SECONDS = 1.0
# How often to try to claim a lock that other processes claim and release at the same time.
_ATTEMPTS = 5


class WorkdirLock:
    """Holds the lock of a workdir within a `with`.

    Args:
      workdir: folder of the run; made if absent.
      active: false for hosts other than the chief, which hold nothing.

    Raises:
      ConfigError: on entering; another process has it, the message says which.
      StorageError: on entering; the workdir cannot be written.
    """

    def __init__(self, workdir: epath.PathLike, *, active: bool = True):
        self._workdir, self._active = expand(workdir), active
        self._file = lock_file(self._workdir / LOCK_FILE)
        self._me = this_process()
        self._held = False
        # Written by the thread, read by `check`: the process that has taken this lock over.
        self._usurper: Owner | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="lock")

    def __enter__(self) -> "WorkdirLock":
        if not self._active:
            return self
        # refused=False: without permission at the first access the path is wrong, most likely.
        try:
            retry(f"locking {self._workdir}", self._acquire, refused=False)
        except FAILURES as error:
            raise self._explained(error) from error
        finally:
            if not self._held:
                self._file.close()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._active:
            return
        # The thread first: it must not renew what is being released.
        self._ended.set()
        self._thread.join()
        with only_warn(f"removing {self._file.path}"):
            self._file.release(self._me)

    def check(self) -> None:
        """Raises StorageError if another process has taken over the workdir since it was locked.

        That can happen to a process that stood still, or could not reach its storage, for longer
        than STALE_SECONDS. Call it before each save: two runs must not write one history.
        """
        if self._usurper is not None:
            raise StorageError(
                f"the workdir {self._workdir} was taken over by {self._usurper}, while this "
                f"process ({self._me}) could not be heard of. It saves nothing more; the other run "
                "goes on from the newest checkpoint"
            )

    def beat(self) -> None:
        """Renews the lock, or notes who has taken it over."""
        owner = self._file.read()
        # Somebody has removed the file, and no other process has taken the lock yet.
        if owner is None:
            return
        if owner.token != self._me.token:
            self._usurper = owner
            return
        self._me = self._me.renewed()
        self._file.renew(self._me)

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with only_warn(f"renewing {self._file.path}"):
                self.beat()

    def _explained(self, error: BaseException) -> BaseException:
        if kind_of(error) in (Kind.REFUSED, Kind.READ_ONLY, Kind.MISSING, Kind.MISNAMED):
            # For a workdir these kinds mean a wrong path more likely than failing storage.
            return ConfigError(
                f"cannot write to the workdir {self._workdir} ({cause(error)}): give another "
                "--workdir, or the rights to write there"
            )
        what = f"cannot write to the workdir {self._workdir}"
        return explain(error, what=what, place=str(self._workdir)) or error

    def _acquire(self) -> None:
        make_folder(self._workdir)
        owner = None
        # Again where another process was faster between two of these calls.
        for _ in range(_ATTEMPTS):
            locking = self._file.lock()
            owner = self._file.read()
            if not self._is_free(owner, locking):
                break
            if owner is not None:
                logging.warning("taking over the workdir %s from %s", self._workdir, owner)
            if locking is Locking.BLOCKED:
                # The owner is dead, but a child of it has inherited the descriptor and keeps the
                # kernel's lock. A new file under the same name is not locked by anyone.
                self._file.discard()
            elif self._file.claim(self._me):
                self._held = True
                return
        raise ConfigError(
            f"the workdir {self._workdir} is in use by {owner or 'another process'}: wait until it "
            "ends, or stop it; or give another --workdir. (If it is certainly gone, remove "
            f"{self._file.path}.)"
        )

    def _is_free(self, owner: Owner | None, locking: Locking) -> bool:
        """Whether the lock may be taken, by the surest sign that this storage gives."""
        if owner is None:
            return locking is not Locking.BLOCKED
        # The kernel gave us the lock of a process of this machine, so that process has ended.
        same_machine = owner.boot == self._me.boot
        if locking is Locking.OURS and same_machine:
            return True
        # Without the kernel's word: by the process number, if it means something here ...
        alive = is_alive(owner)
        if alive is not None:
            return not alive
        # ... and otherwise by whether the owner renews its lock.
        return locking is not Locking.BLOCKED and not self._still_beats(owner)

    def _still_beats(self, owner: Owner) -> bool:
        """Whether a holder on another machine has renewed its lock within STALE_SECONDS.

        Waits until that is certain, at most STALE_SECONDS.
        """
        # What has passed since the last renewal counts as waited.
        first, waited = self._file.beat(), self._file.age()
        if waited < STALE_SECONDS:
            logging.warning(
                "the workdir %s was locked by %s; looking for %.0f s whether that is alive",
                self._workdir,
                owner,
                STALE_SECONDS - waited,
            )
        while waited < STALE_SECONDS:
            time.sleep(POLL_SECONDS)
            waited += POLL_SECONDS
            now = self._file.beat()
            # Changed: renewed, or released if there is nothing any more.
            if now != first:
                return now is not None
        return False
