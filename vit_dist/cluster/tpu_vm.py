"""The TPU that belongs to this machine, and what TensorFlow must be told before it is imported.

TensorFlow and libtpu read variables of the environment while they are imported, and a TPU that
cannot be used shows by an import that hangs or crashes. So all of this is found out first, without
TensorFlow: `prepare` is called by commands that use devices, before anything imports it.
"""

import dataclasses
import fcntl
import glob
import importlib.metadata
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

from vit_dist.cluster import metadata
from vit_dist.cluster.addresses import whole_number
from vit_dist.cluster.tpu_probe import probe
from vit_dist.config.errors import ConfigError

PORT = 8470  # of the gRPC worker on each host of a slice, as Google's own worker has it
_MESH_PORT = 8476  # where the workers' libtpu find each other, on host 0
_PACKAGE = "tensorflow-tpu"  # the only TensorFlow that can use a TPU
# Release of it -> the libtpu that it imports with; its own metadata allow others (~=0.0.14).
_LIBTPU = {"2.20.0": "0.0.24"}
_OLDEST_PJRT = 5  # v5e, v5p and v6e are driven through PJRT; v2, v3 and v4 are not
_OLDEST_SLICE = 4  # the workers of v2 and v3 need tables of bounds, which are not kept here
_LOAD, _PLUGIN, _API = (
    "TPU_LOAD_LIBRARY",  # "0": this process leaves the TPU alone
    "TF_PLUGGABLE_DEVICE_LIBRARY_PATH",
    "NEXT_PLUGGABLE_DEVICE_USE_C_API",
)
_SKIP_METADATA = "TPU_SKIP_MDS_QUERY"  # "1": libtpu takes the variables, and asks no server
_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # a chip is one of these files
_LOCK = "/tmp/libtpu_lockfile"  # libtpu's, held by the process that has the TPU
# Our commands, by what they do with a TPU; all others leave it to a training that may go on.
_PROGRAMS, _WORKER = ("train", "evaluate", "demo", "doctor"), "tpu_worker"


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """A machine of a TPU slice.

    Attributes:
      kind: Cloud TPU's name of the slice's type, such as "v5litepod-16"; "" if nobody tells.
      index: which host of the slice this machine is.
      hosts: names or addresses of all hosts of the slice, without ports.
      has_metadata: whether the metadata server told, and not the environment.
    """

    kind: str
    index: int
    hosts: tuple[str, ...]
    has_metadata: bool = False

    @property
    def generation(self) -> int | None:
        """5 of "v5litepod-16", "v5p-8" and "tpu-v5-lite-podslice"; None if nobody tells."""
        found = re.search(r"\bv(\d+)", self.kind)
        return int(found[1]) if found else None

    @property
    def addresses(self) -> tuple[str, ...]:
        """ "host:port" of the gRPC worker of each host."""
        return tuple(f"{host}:{PORT}" for host in self.hosts)


class Prepared(NamedTuple):
    """What `prepare` found.

    Attributes:
      vm: the TPU machine that this is; None if it is none.
      problem: why its TPU cannot be used; None if it can, as far as is known.
    """

    vm: TpuVm | None = None
    problem: str | None = None


_found = Prepared()


def found() -> Prepared:
    """What `prepare` found in this process; nothing if it was not called, or not needed."""
    return _found


def find_tpu_vm(environ: Mapping[str, str] | None = None) -> TpuVm | None:
    """The TPU machine that this is; None if it is none.

    GKE, and whoever starts containers, tells by variables; a Cloud TPU VM by its metadata server.

    Raises:
      ConfigError: the variables contradict each other.
      OSError: no variable tells, and no metadata server answers.
    """
    environ = os.environ if environ is None else environ
    kind = environ.get("TPU_ACCELERATOR_TYPE", "")
    hosts = [h.strip() for h in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h.strip()]
    if hosts:
        number = environ.get("TPU_WORKER_ID") or ("0" if len(hosts) == 1 else None)
        return _checked(TpuVm(kind, whole_number(number, "TPU_WORKER_ID"), tuple(hosts)))
    told = metadata.read("instance/attributes/accelerator-type")
    if told is None:
        return TpuVm(kind, 0, ("localhost",)) if kind else None
    # "uid:name:10.0.0.2,uid:name:10.0.0.3": the third part is the address.
    endpoints = metadata.read("instance/attributes/worker-network-endpoints") or ""
    hosts = [part.split(":")[2] for part in endpoints.split(",") if part.count(":") >= 2]
    number = metadata.read("instance/attributes/agent-worker-number")
    # One host needs no number. Of several, each would take itself for the first.
    number = number or ("0" if len(hosts) <= 1 else None)
    index = whole_number(number, "agent-worker-number of the metadata server")
    return _checked(TpuVm(told, index, tuple(hosts) or ("localhost",), has_metadata=True))


def _checked(vm: TpuVm) -> TpuVm:
    if vm.index >= len(vm.hosts):
        raise ConfigError(
            f"this is host {vm.index} of a TPU slice, counted from 0, which has {len(vm.hosts)} "
            f"({', '.join(vm.hosts)}): set TPU_WORKER_ID and TPU_WORKER_HOSTNAMES alike on all"
        )
    return vm


def prepare() -> None:
    """Sets the variables that TensorFlow reads about TPUs; call before it is imported.

    Does nothing where this TensorFlow cannot use TPUs. A TPU that cannot be used does not end the
    process: TensorFlow is told to leave it alone, and `found().problem` tells why.
    """
    global _found
    if "tensorflow" in sys.modules or not _can_use_tpus():
        return
    command = _command()
    if command not in (*_PROGRAMS, _WORKER, None) or _wants_no_tpu(sys.argv[1:]):
        leave_alone(os.environ)
        return
    _found = _prepared(os.environ, command)
    if _found.problem is not None:
        leave_alone(os.environ)


def leave_alone(environ: MutableMapping[str, str]) -> None:
    """Lets TensorFlow start without a TPU: it would hang or crash over one that is not there."""
    environ[_LOAD] = "0"
    # With the plugin's path and TPU_LOAD_LIBRARY=0 together, tensorflow-tpu 2.20 aborts.
    _without_plugin(environ)


def _without_plugin(environ: MutableMapping[str, str]) -> None:
    for name in (_PLUGIN, _API):
        environ.pop(name, None)


def _prepared(environ: MutableMapping[str, str], command: str | None) -> Prepared:
    worker = command == _WORKER
    try:
        vm = find_tpu_vm(environ)
        if vm is None:
            return Prepared(None, "the metadata server knows of no TPU: this is no TPU VM")
        variables = worker_variables(vm) if worker else program_variables(vm, environ)
    except (ConfigError, OSError) as error:
        return Prepared(None, str(error))
    if len(vm.hosts) > 1 and not worker:
        leave_alone(environ)  # the workers have the TPU; the program only talks to them
        return Prepared(vm, problem_of_place(vm))
    problem = _problem_of_library() or _problem_of_chips()
    if problem is not None or (worker and len(vm.hosts) == 1):
        return Prepared(vm, problem)
    environ.pop(_LOAD, None)
    if not variables:  # an older TPU, which PJRT does not drive
        _without_plugin(environ)
    environ.update(variables)
    if not vm.has_metadata:
        environ.setdefault(_SKIP_METADATA, "1")
    # Only a command tries the TPU out: an import in a notebook must not start a device. And not a
    # worker, whose process does no more than hold the TPU: the program names it when it is gone.
    return Prepared(vm, probe() if command in _PROGRAMS else None)


def program_variables(vm: TpuVm, environ: Mapping[str, str]) -> dict[str, str]:
    """What the program needs on a TPU of one host; what the user has set already stays."""
    if vm.generation is not None and vm.generation < _OLDEST_PJRT:
        return {}
    path = str(importlib.metadata.distribution("libtpu").locate_file("libtpu/libtpu.so"))
    return {_API: environ.get(_API, "true"), _PLUGIN: environ.get(_PLUGIN, path)}


def worker_variables(vm: TpuVm) -> dict[str, str]:
    """What libtpu needs in the worker of one host of a slice, as Google's worker sets it.

    Raises:
      ConfigError: a TPU that is older than v4.
    """
    if vm.generation is not None and vm.generation < _OLDEST_SLICE:
        raise ConfigError(
            f"a slice of {vm.kind} is not supported: take v4 or newer (docs/tpu.md), or one host"
        )
    return {
        "CLOUD_TPU_TASK_ID": str(vm.index),
        "TPU_LOCK_DEVICE": "true",
        "TPU_MESH_CONTROLLER_ADDRESS": f"{vm.hosts[0]}:{_MESH_PORT}",
        "TPU_MESH_CONTROLLER_PORT": str(_MESH_PORT),
        "TPU_HOSTNAME_OVERRIDE": vm.hosts[vm.index],
    }


def problem_of_place(vm: TpuVm) -> str | None:
    """Why no program may run on this host of a slice; None if one may."""
    if vm.index == 0:
        return None
    return (
        f"this is host {vm.index} of a TPU slice of {len(vm.hosts)} hosts, and the program runs on "
        f"host 0 alone ({vm.hosts[0]}), with python -m vit_dist.tpu_worker on every host: "
        "launch/tpu_vm.sh and launch/jobset_tpu.yaml start both"
    )


def _can_use_tpus() -> bool:
    return importlib.util.find_spec("libtpu") is not None and _version(_PACKAGE) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problem_of_library() -> str | None:
    """TensorFlow crashes in the import, or later, with another libtpu than it was tried with."""
    release, have = _version(_PACKAGE), _version("libtpu")
    wanted = _LIBTPU.get(release or "")
    # Whoever names a library of their own means it.
    if wanted in (None, have) or _PLUGIN in os.environ or "TPU_LIBRARY_PATH" in os.environ:
        return None
    return (
        f"libtpu {have} is installed, and {_PACKAGE} {release} works with {wanted} only: "
        f"python -m pip install libtpu=={wanted}"
    )


def _problem_of_chips() -> str | None:
    if not any(glob.glob(pattern) for pattern in _DEVICES):
        return (
            f"there is no TPU chip: no file {' or '.join(_DEVICES)}. In a container, ask for the "
            "chips (google.com/tpu, or docker run --privileged)"
        )
    if not os.path.exists(_LOCK):
        return None
    try:
        with open(_LOCK) as file:
            # Only asked for: the end of the `with` gives it back.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"another process has the TPU (it holds {_LOCK}): sudo fuser -v {_LOCK} names it"
    except OSError as error:
        reason = error.strerror
        return f"{_LOCK} of another user cannot be opened ({reason}): sudo rm -f {_LOCK}"
    return None


def _wants_no_tpu(arguments: list[str]) -> bool:
    """Whether the command line asks for help only, or for other devices."""
    if {"--help", "-h", "-help", "--helpshort"} & set(arguments):
        return True
    # A value may stand behind "=" or be the next word; the last word's next one is "".
    for word, following in itertools.pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        if name.lstrip("-") == "config.strategy.name":
            return (value if equals else following) not in ("auto", "tpu")
    return False


def _command() -> str | None:
    """Which of our commands this process is; None for a user's own program and for tests."""
    program = Path(sys.argv[0])
    if program.name.startswith("vit-dist-"):
        return program.name.removeprefix("vit-dist-").replace("-", "_")
    return program.stem if program.parent == Path(__file__).parents[1] else None
