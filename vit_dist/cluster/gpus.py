"""NVIDIA's cards on this machine: what keeps TensorFlow from using them, and XLA's flags for them.

No TensorFlow is imported here: XLA's flags have to be set before it starts its devices, and what is
wrong is to be said before it crashes on it. `look` gathers the facts; the other functions judge
facts, so that each judgement can be tested without a card.
"""

import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DATA_DIR = "--xla_gpu_cuda_data_dir"
# Where several GPUs train: the all-reduce may start before the backward pass has ended, and XLA's
# own collectives end with an error after this time rather than never. All of it acts on collectives
# in XLA's program only, so with step.jit=whole; TensorFlow runs those of `split`.
OVERLAP = {
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    "--xla_gpu_enable_pipelined_all_reduce": "true",
    "--xla_gpu_nccl_termination_timeout_seconds": "600",
}
# Sums in a fixed order, and no choice of kernels by how fast they ran this time. Without it two
# runs of one program on an H200 differed in their bits; with it, and without Triton's kernels, a
# resumed run ended as a whole one.
DETERMINISTIC = {"--xla_gpu_deterministic_ops": "true"}
# An unknown flag in XLA_FLAGS aborts the process. These releases were seen to know all flags above.
KNOWN_TO = ("2.20", "2.21")

_CARD_FIELDS = "index,uuid,name,compute_cap,driver_version,memory.total,memory.used"
# CUDA's major version -> the oldest driver for Linux that runs it (CUDA's release notes).
_DRIVERS = {"12": "525.60.13", "13": "580.65.06"}
_LIBDEVICE = Path("nvvm", "libdevice", "libdevice.10.bc")
_PTXAS = Path("bin", "ptxas")
_HIDDEN = ("", "-1")  # values of CUDA_VISIBLE_DEVICES


class Card(NamedTuple):
    """A GPU, as nvidia-smi describes it; memory in MiB."""

    number: int
    uuid: str
    name: str
    capability: tuple[int, int]
    driver: str
    memory: int
    used: int


class Found(NamedTuple):
    """What a machine has for GPUs.

    Attributes:
      device_files: how many cards the driver shows in /dev; 0 without a driver.
      cards: those that this process may use, as nvidia-smi lists them.
      smi_error: why nvidia-smi lists none; "" where it does, or was not asked.
      wheels: whether NVIDIA's libraries are installed from wheels (the extra `gpu`).
      hidden: whether CUDA_VISIBLE_DEVICES hides all cards.
      cuda_root: the folder that has libdevice and ptxas, the first of those that were searched.
      searched: the folders.
    """

    device_files: int = 0
    cards: tuple[Card, ...] = ()
    smi_error: str = ""
    wheels: bool = False
    hidden: bool = False
    cuda_root: Path | None = None
    searched: tuple[Path, ...] = ()


def look(environ: Mapping[str, str] | None = None) -> Found:
    """The facts of this machine; where it has cards, nvidia-smi is asked, which takes a second."""
    environ = os.environ if environ is None else environ
    files, visible = count_device_files(), environ.get("CUDA_VISIBLE_DEVICES")
    cards, error = _ask_smi() if files else ((), "")
    roots = cuda_roots(environ, _wheel_folders())
    return Found(
        device_files=files,
        cards=choose_visible(cards, visible),
        smi_error=error,
        wheels=bool(_wheel_folders()),
        hidden=visible in _HIDDEN,
        cuda_root=find_cuda(roots),
        searched=tuple(roots),
    )


def count_device_files(folder: str = "/dev") -> int:
    """How many cards the driver shows; 1 for the device file by which Windows lends its GPUs."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sum(bool(re.fullmatch(r"nvidia\d+|dxg", name)) for name in names)


def _ask_smi() -> tuple[tuple[Card, ...], str]:
    command = ["nvidia-smi", f"--query-gpu={_CARD_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        # A driver that hangs would hang nvidia-smi as well; it answers within 10 s where it works.
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return (), "there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"nvidia-smi does not answer ({type(error).__name__})"
    if done.returncode:
        text = (done.stdout + done.stderr).strip() or f"exit code {done.returncode}"
        return (), f"nvidia-smi fails: {text.splitlines()[0]}"
    return read_cards(done.stdout), ""


def read_cards(text: str) -> tuple[Card, ...]:
    """The cards in what nvidia-smi prints for _CARD_FIELDS, a line each."""
    cards = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        # A card that has fallen off the bus is a line of words, and a MIG slice has "[N/A]".
        if len(fields) != len(_CARD_FIELDS.split(",")) or not re.fullmatch(r"\d+\.\d+", fields[3]):
            continue
        major, minor = fields[3].split(".")
        number, memory, used = (int(f) if f.isdigit() else 0 for f in (fields[0], *fields[5:]))
        cards.append(
            Card(number, fields[1], fields[2], (int(major), int(minor)), fields[4], memory, used)
        )
    return tuple(cards)


def choose_visible(cards: Sequence[Card], visible: str | None) -> tuple[Card, ...]:
    """The cards that CUDA_VISIBLE_DEVICES, a list of numbers or UUIDs, leaves to this process."""
    if visible is None:
        return tuple(cards)
    chosen = []
    for word in filter(None, (word.strip() for word in visible.split(","))):
        # CUDA takes the beginning of a UUID for all of it.
        found = [c for c in cards if word == str(c.number) or c.uuid.startswith(word)]
        # As CUDA has it: a word that names no card hides all behind it.
        if not found:
            break
        chosen += found[:1]
    return tuple(chosen)


def _wheel_folders() -> list[Path]:
    """The folders of NVIDIA's wheels: site-packages/nvidia."""
    # A namespace package: all wheels put their folders into it, also from several places.
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def cuda_roots(environ: Mapping[str, str], wheels: Sequence[Path]) -> list[Path]:
    """Where CUDA's compiler may be, the likeliest first."""
    given = re.search(rf"{DATA_DIR}=(\S+)", environ.get("XLA_FLAGS", ""))
    # What the user names is all that XLA will look at.
    if given:
        return [Path(given[1])]
    roots = [folder / part for folder in wheels for part in ("cuda_nvcc", "cu13", "cu12")]
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"):
        if environ.get(name):
            roots.append(Path(environ[name]))
    if environ.get("CONDA_PREFIX"):
        conda = Path(environ["CONDA_PREFIX"])
        roots += [conda, conda / "targets" / "x86_64-linux"]
    return [*roots, Path("/usr/local/cuda")]


def find_cuda(roots: Sequence[Path]) -> Path | None:
    """The first folder with what XLA needs: libdevice, its mathematical functions, and ptxas."""
    return next(
        (r for r in roots if (r / _LIBDEVICE).is_file() and (r / _PTXAS).is_file()),
        None,
    )


def xla_flags(
    flags: str, *, cuda_root: Path | None, several: bool, deterministic: bool, tensorflow: str
) -> dict[str, str]:
    """The flags to add to XLA_FLAGS on a machine with GPUs; what `flags` has already stays.

    Args:
      flags: XLA_FLAGS as it is.
      cuda_root: see Found.
      several: whether several GPUs train together.
      deterministic: whether each start is to give the same bits.
      tensorflow: its version.
    """
    if not is_known(tensorflow):
        return {}
    wanted = (OVERLAP if several else {}) | (DETERMINISTIC if deterministic else {})
    if cuda_root is not None:
        wanted[DATA_DIR] = str(cuda_root)
    given = {word.partition("=")[0] for word in flags.split()}
    return {name: value for name, value in wanted.items() if name not in given}


def is_known(tensorflow: str) -> bool:
    """Whether this version of TensorFlow was seen to know the flags of this module."""
    return tensorflow.startswith(tuple(f"{release}." for release in KNOWN_TO))


def why_unseen(found: Found, build: Mapping[str, Any]) -> str:
    """Why TensorFlow may see no GPU, and what to do; `build` is tf.sysconfig.get_build_info()."""
    if not found.device_files:
        return (
            "the driver shows no card (/dev/nvidia0 is not there): install NVIDIA's driver, or "
            "start the container with GPUs (docker run --gpus all)"
        )
    if not build.get("is_cuda_build"):
        return "this TensorFlow is built without CUDA: pip install -e '.[gpu]' in a new environment"
    if not found.cards:
        reason = found.smi_error or "CUDA_VISIBLE_DEVICES names no card that nvidia-smi lists"
        return f"{reason}: the driver is not in order, or not what the container was given"
    old = _too_old(found.cards[0].driver, build)
    if old:
        return old
    if not found.wheels:
        return "CUDA's libraries are not installed from wheels: pip install -e '.[gpu]'"
    return "TF_CPP_MIN_LOG_LEVEL=0 shows which library it misses"


def problems(found: Found, build: Mapping[str, Any]) -> list[str]:
    """What will stop a run on these cards, each with its remedy; see why_unseen for `build`."""
    lines = []
    old = found.cards and _too_old(found.cards[0].driver, build)
    if old:
        lines.append(old)
    # () for a build that does not tell: then its kernels are not judged.
    kernels = build.get("cuda_compute_capabilities", ())
    # Cards of one name are one problem.
    for card in {card.name: card for card in found.cards}.values():
        if kernels and not has_kernels(card.capability, kernels):
            own = ".".join(map(str, card.capability))
            lines.append(
                f"{card.name} has compute capability {own}, for which this TensorFlow has no "
                f"kernels (it has {', '.join(kernels)}): take a build that has, such as NVIDIA's "
                "container, or leave the card out with CUDA_VISIBLE_DEVICES"
            )
    if found.cards and found.cuda_root is None:
        folders = ", ".join(map(str, found.searched))
        lines.append(
            f"XLA needs {_LIBDEVICE} and {_PTXAS}, and none of these folders has both: {folders}. "
            "pip install -e '.[gpu]' brings them; of a CUDA elsewhere set "
            f"XLA_FLAGS={DATA_DIR}=FOLDER"
        )
    return lines


def has_kernels(capability: tuple[int, int], kernels: Sequence[str]) -> bool:
    """Whether TensorFlow's kernels run on a card.

    Args:
      capability: the card's, such as (9, 0).
      kernels: what TensorFlow was built for, such as ["sm_80", "compute_90"]. "sm_" is machine code
        for cards of its major number. "compute_" is code that the driver translates for cards of
        that number and later ones. Across a major number that does not hold: with compute_90 alone
        cards of 10.0 and 12.0 fail with CUDA_ERROR_INVALID_PTX or CUDA_ERROR_INVALID_HANDLE
        (tensorflow#101746, #99592, #111958).
    """
    for kernel in kernels:
        # The last digit is the minor number, those before it are the major one: "sm_120a" is 12.0.
        number = re.search(r"_(\d+)(\d)[af]?$", kernel)
        if number and capability[0] == int(number[1]) and capability[1] >= int(number[2]):
            return True
    return False


def _too_old(driver: str, build: Mapping[str, Any]) -> str | None:
    # A build without CUDA tells no version, and none of _DRIVERS is "": nothing is too old for it.
    cuda = str(build.get("cuda_version", ""))
    needed = _DRIVERS.get(cuda.partition(".")[0])
    if needed is None or _numbers(driver) >= _numbers(needed):
        return None
    return (
        f"the driver is {driver}, and this TensorFlow's CUDA {cuda} needs {needed} or newer: "
        "install a newer driver on the machine (not in the container)"
    )


def _numbers(version: str) -> tuple[int, ...]:
    # As numbers, since of two texts "580.9" would be the newer one, compared with "580.65".
    return tuple(int(number) for number in re.findall(r"\d+", version))


# What CUDA and XLA say while a step is compiled or started -> what it means.
_SAYINGS = {
    r"libdevice not found|libdevice\.10\.bc": (
        "XLA does not find CUDA's libdevice: pip install -e '.[gpu]' brings it, or name CUDA's "
        f"folder by XLA_FLAGS={DATA_DIR}=FOLDER"
    ),
    r"[Cc]ouldn't invoke ptxas|ptxas.{0,40}(?:not found|No such file)|[Nn]o ptxas": (
        "XLA does not find CUDA's compiler ptxas: pip install -e '.[gpu]' brings it, or name "
        f"CUDA's folder by XLA_FLAGS={DATA_DIR}=FOLDER"
    ),
    r"CUDA_ERROR_INVALID_PTX|CUDA_ERROR_INVALID_HANDLE|CUDA_ERROR_NO_BINARY_FOR_GPU|"
    r"no kernel image is available": (
        "this TensorFlow has no kernels for this GPU: take a build that has, such as NVIDIA's "
        "container, or other cards"
    ),
    r"CUDA_ERROR_UNSUPPORTED_PTX_VERSION|driver version is insufficient": (
        "the driver is older than this TensorFlow's CUDA needs: install a newer one on the machine"
    ),
    r"NCCL.{0,80}(?:unhandled|error)|ncclInternalError|ncclSystemError|ncclUnhandledCudaError": (
        "NCCL could not connect the GPUs: NCCL_DEBUG=INFO shows where it stops; containers need "
        "shared memory (--ipc=host), several machines the right network (NCCL_SOCKET_IFNAME)"
    ),
}


def explain(text: str) -> str | None:
    """What an error of CUDA, XLA or NCCL means and what to do; None for any other."""
    return next((said for words, said in _SAYINGS.items() if re.search(words, text)), None)
