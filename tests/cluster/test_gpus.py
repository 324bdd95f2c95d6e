"""What keeps TensorFlow from a machine's GPUs, judged from made-up facts."""

import os
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from tests.support import processes
from vit_dist.cluster import gpus
from vit_dist.cluster.gpus import Card, Found

# As tf.sysconfig.get_build_info() of the wheels of 2.20 and 2.21 has it.
WHEEL = {
    "is_cuda_build": True,
    "cuda_version": "12.5.1",
    "cuda_compute_capabilities": ["sm_60", "sm_70", "sm_80", "sm_89", "compute_90"],
}
SMI = """\
0, GPU-5ae1, NVIDIA H100 80GB HBM3, 9.0, 550.54.15, 81559, 4
1, GPU-77b2, NVIDIA H100 80GB HBM3, 9.0, 550.54.15, 81559, 70000
Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error
"""
CUDA = Path("/cuda")


def card(capability=(9, 0), driver="550.54.15", name="H100", index=0):
    return Card(index, f"GPU-{index}", name, capability, driver, 81559, 0)


def test_the_cards_that_nvidia_smi_lists():
    cards = gpus.read_cards(SMI)
    assert cards == (
        Card(0, "GPU-5ae1", "NVIDIA H100 80GB HBM3", (9, 0), "550.54.15", 81559, 4),
        Card(1, "GPU-77b2", "NVIDIA H100 80GB HBM3", (9, 0), "550.54.15", 81559, 70000),
    )
    assert gpus.read_cards("") == ()


@pytest.mark.parametrize(
    "visible, expected",
    [
        (None, [0, 1]),
        ("1", [1]),
        ("1,0", [1, 0]),
        ("GPU-77", [1]),
        ("", []),
        ("-1", []),
        ("0,7,1", [0]),  # CUDA stops at what it does not know
    ],
)
def test_the_cards_that_a_process_may_use(visible, expected):
    cards = gpus.read_cards(SMI)
    assert [c.number for c in gpus.choose_visible(cards, visible)] == expected


@pytest.mark.parametrize(
    "capability, expected",
    [
        ((5, 2), False),
        ((6, 1), True),
        ((7, 5), True),
        ((8, 6), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), False),
        ((12, 0), False),
    ],
)
def test_kernels(capability, expected):
    assert gpus.has_kernels(capability, WHEEL["cuda_compute_capabilities"]) == expected
    assert gpus.has_kernels((12, 0), ["sm_90", "compute_120"])


@pytest.mark.parametrize(
    "found, words",
    [
        (Found(1, (card(),), cuda_root=CUDA), ()),
        (Found(), ()),
        (Found(1, (card(driver="520.61.05"),), cuda_root=CUDA), ("520.61.05", "525.60.13")),
        (
            Found(1, (card((12, 0), name="RTX 5090"),), cuda_root=CUDA),
            ("RTX 5090 has compute capability 12.0", "sm_89, compute_90", "container"),
        ),
        (
            Found(1, (card(),), searched=(Path("/a"), Path("/b"))),
            ("libdevice.10.bc and bin/ptxas", "/a, /b", "XLA_FLAGS=--xla_gpu_cuda_data_dir="),
        ),
    ],
)
def test_what_will_stop_a_run(found, words):
    lines = gpus.problems(found, WHEEL)
    assert len(lines) == bool(words)
    for word in words:
        assert word in lines[0]


def test_cards_of_one_name_are_one_problem():
    both = tuple(card((12, 0), index=i) for i in range(2))
    assert len(gpus.problems(Found(2, both, cuda_root=CUDA), WHEEL)) == 1


@pytest.mark.parametrize(
    "found, build, words",
    [
        (Found(wheels=True), WHEEL, "docker run --gpus all"),
        (Found(1), {"is_cuda_build": False}, "built without CUDA"),
        (Found(1, smi_error="nvidia-smi fails: version mismatch"), WHEEL, "version mismatch: the"),
        (Found(1), WHEEL, "CUDA_VISIBLE_DEVICES names no card"),
        (Found(1, (card(driver="470.1"),), wheels=True), WHEEL, "470.1, and this TensorFlow's"),
        (Found(1, (card(),)), WHEEL, r"pip install -e '.[gpu]'"),
        (Found(1, (card(),), wheels=True), WHEEL, "TF_CPP_MIN_LOG_LEVEL=0"),
    ],
)
def test_why_no_gpu_is_seen(found, build, words):
    assert words in gpus.why_unseen(found, build)


# CUDA's folders


def make_cuda(root, *, ptxas=True):
    (root / "nvvm" / "libdevice").mkdir(parents=True)
    (root / "nvvm" / "libdevice" / "libdevice.10.bc").touch()
    (root / "bin").mkdir()
    if ptxas:
        (root / "bin" / "ptxas").touch()


@pytest.mark.parametrize(
    "name, environ",
    [
        ("wheels/cuda_nvcc", {}),
        ("home", {"CUDA_HOME": "home"}),
        ("conda", {"CONDA_PREFIX": "conda"}),
        ("own", {"XLA_FLAGS": "--xla_dump_to=x --xla_gpu_cuda_data_dir={}/own"}),
    ],
)
def test_where_libdevice_and_ptxas_are(name, environ, tmp_path):
    environ = {k: v.format(tmp_path) if "{" in v else str(tmp_path / v) for k, v in environ.items()}
    roots = gpus.cuda_roots(environ, [tmp_path / "wheels"])
    assert gpus.find_cuda([r for r in roots if tmp_path in r.parents]) is None
    make_cuda(tmp_path / name)
    assert gpus.find_cuda(roots) == tmp_path / name


def test_a_folder_needs_both(tmp_path):
    make_cuda(tmp_path / "a", ptxas=False)
    make_cuda(tmp_path / "b")
    assert gpus.find_cuda([tmp_path / "a", tmp_path / "b"]) == tmp_path / "b"


def test_this_machine():
    """Whatever it has: no exception, and the cards that CUDA_VISIBLE_DEVICES hides are hidden."""
    found = gpus.look({"CUDA_VISIBLE_DEVICES": "-1"})
    assert found.hidden and not found.cards


@pytest.mark.spawns
def test_nvidia_smi_is_asked(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus._ask_smi() == ((), "there is no nvidia-smi")
    script.write_text(f"#!{sys.executable}\nprint('''{SMI}''')")
    script.chmod(0o755)
    cards, error = gpus._ask_smi()
    assert len(cards) == 2 and not error
    script.write_text(f"#!{sys.executable}\nprint('mismatch')\nraise SystemExit(18)")
    assert gpus._ask_smi() == ((), "nvidia-smi fails: mismatch")


def test_device_files(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert gpus.count_device_files(str(tmp_path)) == 2
    assert gpus.count_device_files(str(tmp_path / "absent")) == 0


# XLA


@pytest.mark.parametrize(
    "flags, options, expected",
    [
        ("", {}, {gpus.DATA_DIR: "/cuda"}),
        ("", {"several": True}, {**gpus.OVERLAP, gpus.DATA_DIR: "/cuda"}),
        ("", {"cuda_root": None}, {}),
        ("", {"cuda_root": None, "deterministic": True}, gpus.DETERMINISTIC),
        (
            "",
            {"several": True, "deterministic": True},
            {**gpus.OVERLAP, **gpus.DETERMINISTIC, gpus.DATA_DIR: "/cuda"},
        ),
        (f"{gpus.DATA_DIR}=/mine", {}, {}),
        ("", {"several": True, "tensorflow": "2.22.0"}, {}),  # may not know them, and would abort
    ],
)
def test_flags(flags, options, expected):
    given = {"cuda_root": CUDA, "several": False, "deterministic": False, "tensorflow": "2.21.0"}
    assert gpus.xla_flags(flags, **{**given, **options}) == expected


def compile_with(flags):
    """In a process that has not called XLA yet: it reads its flags when it is called first."""
    os.environ["XLA_FLAGS"] = " ".join(f"{name}={value}" for name, value in flags.items())
    print(float(tf.function(lambda x: x * 2, jit_compile=True)(tf.constant(4.0))))


@pytest.mark.spawns
def test_xla_knows_the_flags(tmp_path):
    """It aborts the process at one that it does not know."""
    flags = {**gpus.OVERLAP, **gpus.DETERMINISTIC, gpus.DATA_DIR: "/nowhere"}
    code, text = processes.call(compile_with, flags, log=tmp_path / "known")
    assert code == 0 and "8.0" in text.split(), text
    flags["--xla_gpu_no_such_flag"] = "1"
    code, text = processes.call(compile_with, flags, log=tmp_path / "unknown")
    assert code and "Unknown flag" in text, text


@pytest.mark.parametrize(
    "text, words",
    [
        ("INTERNAL: libdevice not found at ./libdevice.10.bc", "does not find CUDA's libdevice"),
        ("Couldn't invoke ptxas --version", "compiler ptxas"),
        ("cuModuleLoadDataEx failed: CUDA_ERROR_INVALID_PTX", "no kernels for this GPU"),
        ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "driver is older"),
        ("NCCL operation failed: unhandled system error", "NCCL_DEBUG=INFO"),
        ("OOM when allocating tensor", None),
    ],
)
def test_sayings(text, words):
    said = gpus.explain(text)
    assert (words is None and said is None) or words in said
