"""Errors that a person can mend; any other error of a run keeps its traceback.

Each class is also the built-in exception that a caller of the Python API would catch. For these
classes `run/cli.py` prints only the message, behind "error:", and exits with the class's exit code.
Schedulers act on that code: after a 1 the same command may succeed, after a 2 it cannot.
"""


class UserError(Exception):
    """The base class. A message says what was given, what is allowed, what to do."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A flag, a config key or an argument that cannot work."""

    exit_code = 2


class DataError(UserError, ValueError):
    """Data or weights that are missing, damaged, or not what they are taken for."""

    exit_code = 2


class StorageError(UserError, OSError):
    """Storage that fails: a full disk, a bucket that does not answer, a folder without rights."""

    def __str__(self) -> str:
        # OSError would show "[Errno 28]" before a message that already says it.
        return str(self.args[-1]) if self.args else ""


class HostLostError(UserError, ConnectionError):
    """Another host of the run is gone or does not answer."""

    # ConnectionError is an OSError too; see StorageError.
    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""


class DivergedError(UserError, FloatingPointError):
    """The loss or gradient is not finite."""
