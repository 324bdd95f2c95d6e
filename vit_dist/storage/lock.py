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
  STALE_SECONDS; so a run waits up to that long when its machine was lost and it starts elsewhere.
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
BEAT_SECONDS = 15.0
STALE_SECONDS = 90.0  # six beats: NFS may show a file's time up to 60 s late
POLL_SECONDS = 1.0
_ATTEMPTS = 5  # to claim a lock that others claim and release at the same time


class WorkdirLock:
    """Holds the lock of a workdir within a `with`.

    Args:
      workdir: of the run; made if absent.
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
        self._usurper: Owner | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="lock")

    def __enter__(self) -> "WorkdirLock":
        if not self._active:
            return self
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
        self._ended.set()
        self._thread.join()
        with only_warn(f"removing {self._file.path}"):
            self._file.release(self._me)

    def check(self) -> None:
        """Raises StorageError if another process has taken the workdir over meanwhile.

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
        if owner is None:
            return  # someone removed the file; nobody has taken its place yet
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
            # Here the path is more likely wrong than the storage.
            return ConfigError(
                f"cannot write to the workdir {self._workdir} ({cause(error)}): give another "
                "--workdir, or the rights to write there"
            )
        what = f"cannot write to the workdir {self._workdir}"
        return explain(error, what=what, place=str(self._workdir)) or error

    def _acquire(self) -> None:
        make_folder(self._workdir)
        owner = None
        for _ in range(_ATTEMPTS):
            locking = self._file.lock()
            owner = self._file.read()
            if not self._is_free(owner, locking):
                break
            if owner is not None:
                logging.warning("taking over the workdir %s from %s", self._workdir, owner)
            if locking is Locking.BLOCKED:
                # The owner is gone, and a child that it left behind keeps its file open.
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
        if owner is None:
            return locking is not Locking.BLOCKED
        same_machine = owner.boot == self._me.boot
        if locking is Locking.OURS and same_machine:
            return True  # the kernel would have kept it for a process that lives
        alive = is_alive(owner)
        if alive is not None:
            return not alive
        return locking is not Locking.BLOCKED and not self._still_beats(owner)

    def _still_beats(self, owner: Owner) -> bool:
        """Whether a holder on another machine renews its lock, or has within STALE_SECONDS."""
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
            if now != first:
                return now is not None  # None: released
        return False
