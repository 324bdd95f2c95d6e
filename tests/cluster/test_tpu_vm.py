"""Which TPU machine this is, what TensorFlow is told, and what is said of a TPU that fails."""

import fcntl
import importlib.metadata
import os
import socket
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from tests.support import metadata as fake
from vit_dist.cluster import metadata, tpu_vm
from vit_dist.cluster import strategy as strategy_lib
from vit_dist.cluster.strategy import check_strategy, resolve
from vit_dist.cluster.tpu_probe import probe, reason_of
from vit_dist.cluster.tpu_vm import Prepared, TpuVm, find_tpu_vm
from vit_dist.config.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ONE = TpuVm("v5litepod-8", 0, ("localhost",))
SLICE = TpuVm("v5litepod-16", 1, ("10.0.0.2", "10.0.0.3"), has_metadata=True)
GKE = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "a.vit,b.vit",
}
PLUGIN, API = "TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "NEXT_PLUGGABLE_DEVICE_USE_C_API"


@pytest.fixture
def no_server(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("GCE_METADATA_HOST", address)
    return address


# the metadata server


def test_what_the_metadata_server_knows(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # of users; it is not asked
    with fake.serve(fake.TPU) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        assert metadata.read("instance/attributes/accelerator-type") == "v5litepod-16"
        assert metadata.read("instance/attributes/other") is None


@pytest.mark.parametrize("answer", [{"status": 403}, {"status": 500}, {"flavor": ""}])
def test_what_answers_and_is_no_metadata_server(answer, monkeypatch):
    with fake.serve(fake.TPU, **answer) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        with pytest.raises(OSError, match=f"what answers at {address} is no metadata server"):
            metadata.read("instance/attributes/accelerator-type")


def test_a_metadata_server_that_is_not_there(no_server):
    with pytest.raises(
        OSError, match=f"the metadata server {no_server} does not answer: .*refused"
    ):
        metadata.read("x")


def test_a_metadata_server_that_says_nothing(monkeypatch):
    monkeypatch.setattr(metadata, "_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        with pytest.raises(OSError, match=f"{address} does not answer: timed out"):
            metadata.read("x")


@pytest.mark.parametrize(
    "path, said",
    [
        ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
        ("instance/preempted", "TRUE"),
    ],
)
def test_a_notice_of_maintenance_is_heard(path, said, monkeypatch):
    heard, reasons = threading.Event(), []

    def asked(reason):
        reasons.append(reason)
        heard.set()

    known = dict(fake.TPU)
    with fake.serve(known) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        with metadata.watch(asked, seconds=0.01):
            assert not heard.wait(0.1)
            known[path] = said
            assert heard.wait(10)
    assert reasons == [f"{path.removeprefix('instance/')} {said}"]


# who this machine is


@pytest.mark.parametrize(
    "environ, found",
    [
        (GKE, TpuVm("v5litepod-16", 1, ("a.vit", "b.vit"))),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, "one"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, TpuVm("", 0, ("localhost",))),
    ],
)
def test_a_container_is_told_by_variables(environ, found, no_server):
    found = TpuVm("v5litepod-16", 0, ("localhost",)) if found == "one" else found
    assert find_tpu_vm(environ) == found


def test_a_slice_whose_metadata_do_not_number_its_hosts(monkeypatch):
    known = dict(fake.TPU)
    del known["instance/attributes/agent-worker-number"]
    with fake.serve(known) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        with pytest.raises(ConfigError, match=r"agent-worker-number .* must be a whole number"):
            find_tpu_vm({})
        known["instance/attributes/worker-network-endpoints"] = "x:y:10.0.0.2"
        assert find_tpu_vm({}).index == 0


def test_a_tpu_vm_is_told_by_its_metadata(monkeypatch):
    known = dict(fake.TPU)
    with fake.serve(known) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        assert find_tpu_vm({}) == SLICE
        assert SLICE.addresses == ("10.0.0.2:8470", "10.0.0.3:8470")
        known.clear()
        assert find_tpu_vm({}) is None
        assert find_tpu_vm({"TPU_ACCELERATOR_TYPE": "v5litepod-8"}) == ONE


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"TPU_WORKER_ID": "2"}, "host 2 of a TPU slice, counted from 0, which has 2"),
        ({"TPU_WORKER_ID": "x"}, "TPU_WORKER_ID must be a whole number"),
        ({"TPU_WORKER_ID": ""}, "TPU_WORKER_ID must be a whole number"),
    ],
)
def test_variables_that_cannot_be(changed, message):
    with pytest.raises(ConfigError, match=message):
        find_tpu_vm({**GKE, **changed})


@pytest.mark.parametrize(
    "kind, generation",
    [("v4-8", 4), ("v5litepod-1", 5), ("v5p-8", 5), ("tpu-v5-lite-podslice", 5), ("v6e-4", 6)],
)
def test_generation(kind, generation):
    assert TpuVm(kind, 0, ("localhost",)).generation == generation
    assert TpuVm("", 0, ("localhost",)).generation is None


# what TensorFlow is told


@pytest.fixture
def well(monkeypatch, tmp_path):
    """A TPU that is well, as far as files tell; the path of its lock."""
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(tpu_vm, "_DEVICES", (f"{tmp_path}/accel[0-9]*",))
    monkeypatch.setattr(tpu_vm, "_LOCK", str(tmp_path / "lock"))
    monkeypatch.setattr(tpu_vm, "_problem_of_library", lambda: None)
    monkeypatch.setattr(tpu_vm, "probe", lambda: None)
    monkeypatch.setattr(
        tpu_vm.importlib.metadata,
        "distribution",
        lambda name: importlib.metadata.PathDistribution(tmp_path / f"{name}.dist-info"),
    )
    return tmp_path


def prepared(environ, command="train"):
    return tpu_vm._prepared(environ, command)


def one_host(kind):
    return {"TPU_ACCELERATOR_TYPE": kind, "TPU_WORKER_HOSTNAMES": "localhost"}


@pytest.mark.parametrize("kind", ["v5litepod-8", "v5p-8", "v6e-8"])
def test_one_host_from_v5_on_is_driven_by_pjrt(kind, well):
    environ = {**one_host(kind), "TPU_LOAD_LIBRARY": "0"}
    assert prepared(environ) == Prepared(TpuVm(kind, 0, ("localhost",)))
    assert environ[API] == "true" and environ[PLUGIN].endswith("/libtpu/libtpu.so")
    # The metadata server, which has not told, is not asked by libtpu either.
    assert environ["TPU_SKIP_MDS_QUERY"] == "1" and "TPU_LOAD_LIBRARY" not in environ


def test_what_the_user_has_set_stays(well):
    environ = {**one_host("v5litepod-8"), PLUGIN: "/lib/libtpu.so"}
    prepared(environ)
    assert environ[PLUGIN] == "/lib/libtpu.so"


def test_v4_must_not_have_them(well):
    environ = {**one_host("v4-8"), PLUGIN: "x", API: "true"}
    assert prepared(environ).problem is None
    assert not {PLUGIN, API} & set(environ)


def test_the_program_of_a_slice_leaves_the_tpu_to_the_workers(well):
    environ = {**GKE, "TPU_WORKER_ID": "0", PLUGIN: "x", API: "true"}
    found = prepared(environ)
    assert found.problem is None and found.vm.hosts == ("a.vit", "b.vit")
    assert environ["TPU_LOAD_LIBRARY"] == "0" and not {PLUGIN, API} & set(environ)


def test_a_program_on_another_host_of_a_slice(well):
    assert "the program runs on host 0 alone (a.vit)" in prepared(dict(GKE)).problem


def test_a_worker_is_told_what_googles_own_worker_is(well):
    environ = dict(GKE)
    assert prepared(environ, "tpu_worker").problem is None
    added = {name: value for name, value in environ.items() if name not in GKE}
    assert added == {
        "CLOUD_TPU_TASK_ID": "1",
        "TPU_LOCK_DEVICE": "true",
        "TPU_MESH_CONTROLLER_ADDRESS": "a.vit:8476",
        "TPU_MESH_CONTROLLER_PORT": "8476",
        "TPU_HOSTNAME_OVERRIDE": "b.vit",
        "TPU_SKIP_MDS_QUERY": "1",
    }


def test_a_worker_of_an_old_slice(well):
    environ = {**GKE, "TPU_ACCELERATOR_TYPE": "v3-32"}
    assert "a slice of v3-32 is not supported" in prepared(environ, "tpu_worker").problem


def test_only_a_command_tries_the_tpu_out(well, monkeypatch):
    monkeypatch.setattr(tpu_vm, "probe", lambda: "it crashed")
    for command, problem in (("train", "it crashed"), ("evaluate", "it crashed"), (None, None)):
        assert prepared(one_host("v5litepod-8"), command).problem == problem
    assert prepared(dict(GKE), "tpu_worker").problem is None


def test_no_chip(well):
    (well / "accel0").unlink()
    assert "there is no TPU chip: no file" in prepared(one_host("v5litepod-8")).problem


def test_a_tpu_that_another_process_has(well):
    with open(well / "lock", "w") as file:
        assert prepared(one_host("v5litepod-8")).problem is None  # left behind by one that ended
        fcntl.flock(file, fcntl.LOCK_EX)
        problem = prepared(one_host("v5litepod-8")).problem
    assert f"another process has the TPU (it holds {well}/lock)" in problem


def test_no_metadata_server(no_server, well):
    problem = prepared({}).problem
    assert problem.startswith(f"the metadata server {no_server} does not answer: ")


def test_a_machine_without_a_tpu(well, monkeypatch):
    with fake.serve({}) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        assert "this is no TPU VM" in prepared({}).problem


@pytest.mark.parametrize(
    "release, have, wrong",
    [("2.20.0", "0.0.24", False), ("2.20.0", "0.0.52", True), ("2.21.0", "0.0.52", False)],
)
def test_another_libtpu_than_tensorflow_works_with(release, have, wrong, monkeypatch):
    versions = {"libtpu": have, "tensorflow-tpu": release}
    monkeypatch.setattr(tpu_vm, "_version", versions.get)
    problem = tpu_vm._problem_of_library()
    assert (problem is not None) == wrong
    if wrong:
        assert "libtpu 0.0.52 is installed" in problem and "install libtpu==0.0.24" in problem
        monkeypatch.setenv("TPU_LIBRARY_PATH", "/lib/libtpu.so")
        assert tpu_vm._problem_of_library() is None


def test_the_extra_pins_what_works_together():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(pin.split("==") for pin in extras["optional-dependencies"]["tpu"])
    assert tpu_vm._LIBTPU[pins["tensorflow-tpu"]] == pins["libtpu"]


PACKAGE = os.path.dirname(os.path.dirname(tpu_vm.__file__))


@pytest.mark.parametrize(
    "program, command",
    [
        (f"{PACKAGE}/train.py", "train"),
        ("/usr/bin/vit-dist-train", "train"),
        ("/usr/bin/vit-dist-tpu-worker", "tpu_worker"),
        ("/home/x/train.py", None),
        ("pytest", None),
        ("", None),
    ],
)
def test_which_command_this_process_is(program, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    assert tpu_vm._command() == command


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ([], True),
        (["--config=x", "--config.strategy.name=tpu"], True),
        (["--config.strategy.name", "auto"], True),
        (["--config.strategy.name=local"], False),
        (["--config.strategy.name", "single"], False),
        (["--help"], False),
    ],
)
def test_whether_the_command_line_wants_a_tpu(arguments, wanted):
    assert tpu_vm._wants_no_tpu(arguments) != wanted


def test_nothing_is_done_without_tensorflow_for_tpus(monkeypatch):
    """As here, where prepare() was called before TensorFlow was imported."""
    assert tpu_vm.found() == Prepared()
    assert "TPU_LOAD_LIBRARY" not in os.environ


def test_other_commands_leave_the_tpu_alone(monkeypatch):
    monkeypatch.setattr(tpu_vm, "_can_use_tpus", lambda: True)
    monkeypatch.delitem(sys.modules, "tensorflow")
    monkeypatch.setattr(sys, "argv", [f"{PACKAGE}/show.py"])
    monkeypatch.setattr(tpu_vm, "_found", Prepared())
    monkeypatch.setenv("TPU_LOAD_LIBRARY", "1")
    monkeypatch.setenv(PLUGIN, "x")
    tpu_vm.prepare()
    assert os.environ["TPU_LOAD_LIBRARY"] == "0" and PLUGIN not in os.environ
    assert tpu_vm.found() == Prepared()


# what the strategy makes of it


def test_auto_takes_the_tpu_of_a_tpu_vm(monkeypatch):
    monkeypatch.setattr(tpu_vm, "_found", Prepared(ONE))
    check_strategy()
    assert resolve("auto") == "tpu"
    monkeypatch.setattr(tpu_vm, "_found", Prepared(ONE, "it crashed"))
    with pytest.raises(ConfigError, match=r"found no TPU 'local' \(it crashed\)"):
        check_strategy()
    check_strategy(name="single")


def test_a_machine_that_is_no_tpu_vm_may_reach_others(monkeypatch):
    monkeypatch.setattr(tpu_vm, "_found", Prepared(None, "no TPU VM"))
    assert strategy_lib._takes_tpu("auto", "") is False
    check_strategy(name="tpu", tpu="mine", tpu_zone="z")
    with pytest.raises(ConfigError, match=r"found no TPU 'local' \(no TPU VM\)"):
        check_strategy(name="tpu")


# trying a TPU out


@pytest.mark.spawns
@pytest.mark.parametrize(
    "trial, said",
    [
        ("print('fine')", None),
        (
            "import sys; print('vit_dist: Graph execution error: // Detected at node x // "
            "{{node x}} no chip [[{{x}}]]'); sys.exit(1)",
            "no chip",
        ),
        ("import sys; sys.exit(3)", "the trial of the TPU ended with exit code 3"),
        (
            "import os, sys; print('I0000 00:00:1.5 7 a.cc:1] on'); "
            "print('F0000 00:00:1.5  7 b.cc:748] Non-OK-status: x()'); sys.stdout.flush(); "
            "os.kill(os.getpid(), 11)",
            "libtpu crashed while it started the TPU (SIGSEGV): Non-OK-status: x()",
        ),
    ],
)
def test_a_trial_is_told_in_one_line(trial, said):
    assert probe(trial=trial) == said


@pytest.mark.spawns
def test_a_trial_that_hangs_is_given_up():
    trial = "print('Failed to get TPU metadata', flush=True); import time; time.sleep(100)"
    said = "libtpu did not start the TPU within 1 s: Failed to get TPU metadata"
    assert probe(seconds=1.0, trial=trial) == said


def test_the_reason_in_tensorflows_message():
    text = (
        "Graph execution error:\n\nDetected at node disconnect_tpu_host/_1 defined at (most recent "
        "call last):\n<stack traces unavailable>\nRET_CHECK failure (x.cc:432) *platform \n\t "
        "[[{{node disconnect_tpu_host/_1}}]] [Op:__inference__tpu_init_fn_4]"
    )
    assert reason_of(text) == "RET_CHECK failure (x.cc:432) *platform"
    assert reason_of("") == ""
