"""TensorFlow for TPUs, the real wheel, on a machine without a TPU: `make test-tpu` runs this.

Each failure ends with one line that a person can read, within a minute where nothing else runs.
"""

import os
import socket
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.support import metadata as fake
from tests.support import processes

pytestmark = pytest.mark.spawns

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-tpu" / "bin" / "python"
# A machine that is busy otherwise takes longer than a minute; where libtpu itself hangs over a
# metadata server that is not there, it does so for ten.
SECONDS = 240
V5E = {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
PLUGIN = "TF_PLUGGABLE_DEVICE_LIBRARY_PATH"


def run(*words, environ=None, path=ROOT):
    """Runs the wheel's Python; returns exit code and output."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("TPU", "TF_", "CUDA"))}
    done = subprocess.run(
        [str(PYTHON), *map(str, words)],
        env={**given, "PYTHONPATH": f"{path}:{ROOT}", **(environ or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    return done.returncode, done.stdout


def train(tmp_path, *flags, **options):
    return run(
        "-m",
        "vit_dist.train",
        f"--config={processes.TINY}",
        f"--workdir={tmp_path}/run",
        "--config.strategy.name=tpu",
        *flags,
        **options,
    )


def error_of(text):
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text and "Fatal Python error" not in text
    return line


@pytest.fixture
def no_server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    return {"GCE_METADATA_HOST": address}


def test_the_wheel_is_the_one_that_the_extra_names():
    code, text = run("-c", "import importlib.metadata as m; print(m.version('tensorflow-tpu'))")
    assert code == 0 and text.strip() == "2.20.0"


def test_no_device(tmp_path):
    code, text = train(tmp_path, environ=V5E)
    assert code == 2, text
    assert "found no TPU 'local' (there is no TPU chip: no file /dev/accel" in error_of(text)


def test_no_metadata_server(tmp_path, no_server):
    code, text = train(tmp_path, environ=no_server)
    assert code == 2, text
    address = no_server["GCE_METADATA_HOST"]
    assert f"the metadata server {address} does not answer" in error_of(text)


def test_a_metadata_server_that_says_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code, text = train(tmp_path, environ={"GCE_METADATA_HOST": address})
    assert code == 2, text
    assert f"the metadata server {address} does not answer" in error_of(text)


def test_a_machine_of_googles_without_a_tpu(tmp_path):
    with fake.serve({}) as address:
        code, text = train(tmp_path, environ={"GCE_METADATA_HOST": address})
    assert code == 2 and "this is no TPU VM" in error_of(text)


def test_another_libtpu(tmp_path):
    """Its metadata come first on the path, as those of a package that was installed over it."""
    info = tmp_path / "site" / "libtpu-0.0.52.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: libtpu\nVersion: 0.0.52\n")
    code, text = train(tmp_path, environ=V5E, path=tmp_path / "site")
    assert code == 2, text
    message = error_of(text)
    assert "libtpu 0.0.52 is installed, and tensorflow-tpu 2.20.0 works with 0.0.24" in message


# Files that look like a chip: libtpu is started, and crashes.
PRETEND = """
    import sys
    from vit_dist.cluster import tpu_vm
    tpu_vm._DEVICES = ("/dev/null",)
    tpu_vm._command = lambda: "train"
    from vit_dist import train
    sys.argv = ["train.py", *sys.argv[1:]]
    train.script()
"""


def test_a_crash_in_libtpu(tmp_path):
    code, text = run(
        "-c",
        textwrap.dedent(PRETEND),
        f"--config={processes.TINY}",
        f"--workdir={tmp_path}/run",
        "--config.strategy.name=tpu",
        environ={**V5E, "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_ID": "0"},
    )
    assert code == 2, text
    assert "found no TPU 'local' (libtpu " in error_of(text)


def test_the_variables_are_set_before_tensorflow_is_imported():
    """A process that is none of our commands does not try the TPU out: TensorFlow imports."""
    script = """
        import os
        from vit_dist.cluster import tpu_vm
        tpu_vm._DEVICES = ("/dev/null",)
        from vit_dist.run import cli
        import tensorflow as tf
        assert tpu_vm.found().problem is None, tpu_vm.found()
        path = os.environ["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"]
        assert os.path.exists(path), path
        assert os.environ["NEXT_PLUGGABLE_DEVICE_USE_C_API"] == "true"
        print("imported", tf.__version__)
    """
    environ = {**V5E, "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_ID": "0"}
    code, text = run("-c", textwrap.dedent(script), environ=environ)
    assert code == 0 and "imported 2.20.0" in text, text


def test_the_program_of_a_slice_starts_beside_workers(tmp_path):
    """With TPU_LOAD_LIBRARY=0 and without the plugin, which would abort; workers are missing."""
    environ = {
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2",
        PLUGIN: "/lib/libtpu.so",
        "NEXT_PLUGGABLE_DEVICE_USE_C_API": "true",
    }
    flags = ("--config.strategy.timeout_seconds=1",)
    code, text = train(tmp_path, *flags, environ=environ)
    assert code == 1, text
    assert "waited 1 s in vain for the worker of TPU host 0 (127.0.0.1:8470)" in error_of(text)


def test_other_commands_do_not_touch_the_tpu(tmp_path):
    code, text = run(
        "-m",
        "vit_dist.show",
        f"--config={processes.TINY}",
        f"--output={tmp_path}/sheet.png",
        environ=V5E,
    )
    assert code == 0, text
    assert (tmp_path / "sheet.png").exists()


def test_no_worker_is_needed_for_one_host():
    code, text = run("-m", "vit_dist.tpu_worker", environ=V5E)
    assert code == 2 and "there is no TPU chip" in error_of(text)


def test_what_trains_elsewhere_trains_beside_the_wheel(tmp_path):
    """strategy.name=single on a TPU VM: the CPU, and the TPU is left alone."""
    code, text = run(
        "-m",
        "vit_dist.train",
        f"--config={processes.TINY}",
        f"--workdir={tmp_path}/run",
        "--config.strategy.name=single",
        environ=V5E,
    )
    assert code == 0, text
    assert "done: step 12" in text
