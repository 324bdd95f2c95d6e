"""The launchers: exact commands, clear errors, signals."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import launch, make_env
from tests.support.supervision import Launch
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
TRAIN = f"{sys.executable} -m vit_dist.train"
FLAGS = ("--config", "configs/demo.py", "--workdir", "runs/x")
SHOWN = " ".join(FLAGS)
TPU = {"TPU_NAME": "vit", "TPU_ZONE": "us-west4-a"}
CD = f"cd {ROOT} && "


def dry_run(script, *args, **variables):
    done = launch(script, "--dry-run", *args, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


TPU_FLAGS = ("--config", "configs/x.py", "--workdir", "gs://b/c")


def tf_config(workers, index):
    cluster = ", ".join(f'"{worker}"' for worker in workers)
    task = f'{{"type": "worker", "index": {index}}}'
    return f'{{"cluster": {{"worker": [{cluster}]}}, "task": {task}}}'


# dry runs

LOCAL = f"{CD}env -u TF_CONFIG -u TPU_NAME {TRAIN}"
LOCAL_CPU = f"{CD}env -u TF_CONFIG -u TPU_NAME CUDA_VISIBLE_DEVICES=-1 {TRAIN}"
PIPE = "--config.pp=flip|keep('a b')"
TWO_CPUS = "--config.strategy.name=mirrored --config.strategy.virtual_cpus=2"


@pytest.mark.parametrize(
    "args,line",
    [
        (FLAGS, f"{LOCAL} {SHOWN} --config.strategy.name=local"),
        (("--cpus", 2, *FLAGS), f"{LOCAL_CPU} {SHOWN} {TWO_CPUS}"),
        ((*FLAGS, "--cpus=2"), f"{LOCAL_CPU} {SHOWN} {TWO_CPUS}"),
        (
            (*FLAGS, "--config.strategy.name=single"),
            f"{LOCAL} {SHOWN} --config.strategy.name=single",
        ),
        (
            (*FLAGS, "--config.seed", "-1", PIPE, "--", "--v=1", "x"),
            f"{LOCAL} {SHOWN} --config.seed -1 "
            f"{shlex.quote(PIPE)} --v=1 x --config.strategy.name=local",
        ),
    ],
)
def test_local_command(args, line):
    (shown,) = dry_run("local.sh", *args)
    assert shown == line


def test_workers_on_one_machine(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hosts = ["localhost:5000", "localhost:5001"]
    args = ("--workers", 2, "--port", 5000, "--gpus-per-worker=2", *FLAGS)
    assert dry_run("workers.sh", *args) == [
        f"{CD}mkdir -p runs/x/logs && env 'TF_CONFIG={tf_config(hosts, i)}' "
        f"CUDA_VISIBLE_DEVICES={gpus} {TRAIN} {SHOWN} "
        f"--config.strategy.name=multiworker >> runs/x/logs/worker-{i}.log 2>&1 &"
        for i, gpus in enumerate(("0,1", "2,3"))
    ]


def test_a_host_share():
    args = ("--hosts", "a:1,[::1]:2,c.d-e:3", "--index", 1, *FLAGS)
    (line,) = dry_run("workers.sh", *args)
    assert line == (
        f"{CD}mkdir -p runs/x/logs && env "
        f"'TF_CONFIG={tf_config(['a:1', '[::1]:2', 'c.d-e:3'], 1)}' {TRAIN} {SHOWN} "
        "--config.strategy.name=multiworker >> runs/x/logs/worker-1.log 2>&1 &"
    )


def test_tf_config_is_json_and_ports_are_free_ones():
    lines = dry_run("workers.sh", "--workers", 3, *FLAGS)
    words = [word for line in lines for word in shlex.split(line) if word.startswith("TF_CONFIG=")]
    configs = [json.loads(word.removeprefix("TF_CONFIG=")) for word in words]
    assert [config["task"] for config in configs] == [
        {"type": "worker", "index": i} for i in range(3)
    ]
    (workers,) = {tuple(config["cluster"]["worker"]) for config in configs}
    assert len(set(workers)) == 3
    assert all(worker.startswith("localhost:") for worker in workers)


@pytest.mark.parametrize(
    "flags,log",
    [
        (("--workdir=runs/y",), "runs/y/logs/worker-0.log"),
        (("--workdir=gs://bucket/y",), "runs/logs/worker-0.log"),
        (("--workdir=runs/y", "--logs", "/tmp/a b"), "'/tmp/a b/worker-0.log'"),
    ],
)
def test_where_logs_go(flags, log):
    (line,) = dry_run("workers.sh", "--workers=1", "--port=1", "--config=c.py", *flags)
    assert line.endswith(f" >> {log} 2>&1 &")


GCLOUD = "gcloud compute tpus tpu-vm"
QUEUED = "gcloud compute tpus queued-resources"


@pytest.mark.parametrize(
    "args,line",
    [
        (
            ("create", "--type", "v5litepod-8", "--spot", "--project=p"),
            f"{GCLOUD} create vit --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite "
            "--spot --zone=us-west4-a --project=p",
        ),
        (
            ("create", "--type=v4-8", "--version=mine", "--name=other"),
            f"{GCLOUD} create other --accelerator-type=v4-8 --version=mine --zone=us-west4-a",
        ),
        (
            ("create", "--type", "v5litepod-16", "--queued", "--spot"),
            f"{QUEUED} create vit --node-id=vit --accelerator-type=v5litepod-16 "
            "--runtime-version=v2-alpha-tpuv5-lite --spot --zone=us-west4-a",
        ),
        (
            ("status", "--queued"),
            f"{QUEUED} describe vit '--format=value(state.state)' --zone=us-west4-a",
        ),
        (
            ("status",),
            f"{GCLOUD} describe vit '--format=value(state,health)' --zone=us-west4-a",
        ),
        (("delete", "--queued"), f"{QUEUED} delete vit --force --quiet --zone=us-west4-a"),
        (("ssh",), f"{GCLOUD} ssh vit --zone=us-west4-a"),
        (("delete",), f"{GCLOUD} delete vit --quiet --zone=us-west4-a"),
    ],
)
def test_tpu_vm_command(args, line):
    assert dry_run("tpu_vm.sh", *args, **TPU) == [line]


def remote(line, worker):
    """The command that is run on hosts of a TPU, as the shell there gets it."""
    words = shlex.split(line)
    assert words[: len(GCLOUD.split()) + 1] == [*GCLOUD.split(), "ssh"]
    assert f"--worker={worker}" in words and words[-1] == "--zone=us-west4-a"
    (command,) = [w.removeprefix("--command=") for w in words if w.startswith("--command=")]
    return command


@pytest.fixture
def vm(tmp_path):
    """Runs the commands for a TPU VM on this machine, with a Python that shows its words."""
    home = tmp_path / "home"
    python = home / "vit_dist/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\necho "$@"; test -z "$STAY" || sleep 60\n')
    python.chmod(0o755)

    def run(command, **variables):
        return subprocess.run(
            ["bash", "-c", command],
            cwd=home,
            env=os.environ | {"STAY": ""} | variables,
            capture_output=True,
            text=True,
        )

    run.folder = home / "vit_dist"
    return run


def test_tpu_vm_run_starts_workers_on_all_hosts_and_the_program_on_one(vm):
    flags = ("--config", "configs/x.py", "--workdir", "gs://b/a c")
    check, worker, train = dry_run("tpu_vm.sh", "run", *flags, **TPU)
    assert vm(remote(check, 0)).returncode == 0
    for command in (remote(worker, "all"), remote(train, 0)):
        assert re.fullmatch(r"started (worker|train) as process \d+\n", vm(command).stdout)
    wait_for(lambda: (vm.folder / "train.log").exists() and (vm.folder / "train.log").read_text())
    wait_for(lambda: (vm.folder / "worker.log").read_text())
    assert (vm.folder / "worker.log").read_text() == "-u -m vit_dist.tpu_worker\n"
    assert (vm.folder / "train.log").read_text() == (
        "-u -m vit_dist.train --config configs/x.py --workdir gs://b/a c "
        "--config.strategy.name=tpu --config.strategy.tpu=local\n"
    )


def test_tpu_vm_does_not_start_a_second_run_beside_one_that_goes_on(vm):
    check, worker, train = dry_run("tpu_vm.sh", "run", *TPU_FLAGS, **TPU)
    for command in (remote(worker, "all"), remote(train, 0)):
        assert vm(command, STAY="1").returncode == 0
    done = vm(remote(check, 0))
    assert done.returncode == 2
    assert done.stderr == "a training runs already: launch/tpu_vm.sh stop\n"
    (stop,) = dry_run("tpu_vm.sh", "stop", **TPU)
    done = vm(remote(stop, 0))
    assert done.returncode == 0 and "-m vit_dist.train" in done.stdout
    # A worker whose program never came is replaced.
    first = (vm.folder / "worker.pid").read_text()
    assert vm(remote(worker, "all")).returncode == 0
    assert (vm.folder / "worker.pid").read_text() != first
    # Of a process that nobody has buried yet the file is there, and empty.
    words = Path(f"/proc/{first.strip()}/cmdline")
    assert not words.exists() or not words.read_bytes()
    # After a reboot the number may be that of a process which is none of ours.
    (vm.folder / "train.pid").write_text(f"{os.getpid()}\n")
    assert vm(remote(check, 0)).returncode == 0


def test_tpu_vm_logs_of_all_hosts():
    (line,) = dry_run("tpu_vm.sh", "logs", **TPU)
    assert "tail -n 100 -F train.log worker.log" in remote(line, "all")
    subprocess.run(["bash", "-n", "-c", remote(line, "all")], check=True)


def test_tpu_vm_install():
    mkdir, tar, copy, install = dry_run("tpu_vm.sh", "install", **TPU)
    archive = f"{ROOT}/build/checkout.tgz"
    assert mkdir == f"mkdir -p {ROOT}/build"
    assert tar.startswith(f"tar -czf {archive} -C {ROOT} ") and tar.endswith(" .")
    scp = f"{GCLOUD} scp {archive} vit:checkout.tgz --worker=all --zone=us-west4-a"
    assert copy == scp
    words = shlex.split(install)
    remote = next(word for word in words if word.startswith("--command="))
    assert remote.endswith(".venv/bin/python -m pip install --quiet -e '.[tpu]'")
    subprocess.run(["bash", "-n", "-c", remote.removeprefix("--command=")], check=True)


# errors


@pytest.mark.parametrize(
    "script,args,message",
    [
        ("local.sh", ("--cpuz", 2), "Unknown command line flag 'cpuz'"),
        ("local.sh", ("--cpus", "two"), "--cpus needs a whole number, not 'two'"),
        ("local.sh", ("--cpus=0", *FLAGS), "--cpus=0"),
        ("local.sh", ("--cpus",), "Missing value for flag --cpus"),
        ("local.sh", ("demo.py",), "unexpected 'demo.py'"),
        ("local.sh", ("--config",), "--config needs a value"),
        ("local.sh", (), "--config is missing: give --config FILE and --workdir DIR"),
        ("local.sh", ("--config=x",), "--workdir is missing"),
        ("local.sh", ("--cpus=2", *FLAGS, "--config.strategy.name=single"), "is set by --cpus"),
        ("local.sh", ("--cpus=2", "--workers=2", *FLAGS), "leave out --workers and --hosts"),
        ("local.sh", ("--logs=x", *FLAGS), "--logs belongs to --workers and --hosts"),
        ("local.sh", ("--v=1", "--grace=-1", *FLAGS), "--grace=-1"),
        ("workers.sh", FLAGS, "give --workers N for this machine alone, or --hosts LIST"),
        ("workers.sh", ("--workers=0", *FLAGS), "--workers=0"),
        ("workers.sh", ("--workers=2", "--hosts=a:1"), "give one of them"),
        ("workers.sh", ("--workers=2", "--index=1", *FLAGS), "--host_index belongs to --hosts"),
        ("workers.sh", ("--workers=2", "--port=65535", *FLAGS), "no room for 2 ports"),
        (
            "workers.sh",
            ("--workers=2", *FLAGS, "--config.strategy.name=single"),
            "set by --workers",
        ),
        ("workers.sh", ("--hosts=a:1,b:x", "--index=0", *FLAGS), "'b:x"),
        ("workers.sh", ("--hosts=a:1,a:1", "--index=0", *FLAGS), "several hosts have the address"),
        ("workers.sh", ("--hosts=192.0.2.1,b.invalid", *FLAGS), "give --host_index"),
        ("workers.sh", ("--hosts=a:1,b:2", "--index=2", *FLAGS), "--host_index 2 is out of range"),
        ("workers.sh", ("--hosts=a:1", "--index=0", "--port=1"), "--port belongs to --workers"),
        ("tpu_vm.sh", (), "say what to do"),
        ("tpu_vm.sh", ("crate",), "unexpected 'crate'"),
        ("tpu_vm.sh", ("ssh", "--name="), "give --name"),
        ("tpu_vm.sh", ("create",), "create needs --type"),
        ("tpu_vm.sh", ("create", "--type=v3-32"), "v3-32 has several hosts: of v2 and v3 only"),
        ("tpu_vm.sh", ("run", "--queued"), "--queued belongs to create, status and delete"),
        ("tpu_vm.sh", ("logs", "--workdir=x"), "only run takes flags of vit_dist.train"),
        ("tpu_vm.sh", ("delete", "--spot"), "--spot belongs to create"),
        ("tpu_vm.sh", ("run", "--config=x"), "--workdir is missing"),
        ("tpu_vm.sh", ("run", *FLAGS), "'runs/x', a folder on the VM's own disk, which goes with"),
    ],
)
def test_bad_options(script, args, message):
    args = [args] if isinstance(args, str) else args
    done = launch(script, "--dry-run", *args, **TPU)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr and done.stderr.startswith((f"{script}: ", "error: "))
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", ["local.sh", "workers.sh", "tpu_vm.sh"])
def test_help(script, flag):
    done = launch(script, flag)
    assert done.returncode == 0
    assert f"launch/{script}" in done.stdout and "--dry-run" in done.stdout
    assert "set -euo" not in done.stdout and "#" not in done.stdout


def test_shellcheck():
    scripts = [*sorted(map(str, ROOT.glob("launch/*.sh"))), str(ROOT / ".ci" / "run")]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# the scripts become the supervisor, whose own tests are in test_supervisor.py


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_script_reaches_the_workers(tmp_path, name):
    body = "on_term('saved', code=42); print('ready', flush=True); wait()"
    script = (ROOT / "launch" / "workers.sh",)
    with Launch(tmp_path, body, "--port=5000", command=script) as launched:
        launched.wait_until_ready()
        launched.send(signal.Signals[name])
        code, out, _ = launched.end()
    assert code == 42 and out.count("saved\n") == 2


@pytest.mark.parametrize(
    ("script", "option"), [("local.sh", "--cpus=2"), ("workers.sh", "--workers=2")]
)
def test_paths_are_relative_to_the_checkout(tmp_path, script, option):
    command = [ROOT / "launch" / script, "--dry-run", option, *FLAGS]
    done = subprocess.run(command, cwd=tmp_path, env=make_env(), capture_output=True, text=True)
    assert all(line.startswith(CD) for line in done.stdout.splitlines())


def test_what_dry_run_prints_works_in_any_folder(tmp_path):
    """A program that shows its words is put into the place of Python: it need not train."""
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\necho "$PWD $*"\n')
    fake.chmod(0o755)
    flags = ("--config=c.py", f"--workdir={tmp_path}/a b")
    (local,) = dry_run("local.sh", *flags)
    (worker,) = dry_run("workers.sh", "--workers=1", "--port=1", *flags)
    local, worker = (line.replace(sys.executable, str(fake)) for line in (local, worker))
    words = f"{ROOT} -m vit_dist.train --config=c.py --workdir={tmp_path}/a b"
    shell = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    shown = subprocess.run(["bash", "-c", local], **shell).stdout
    assert shown == f"{words} --config.strategy.name=local\n"
    subprocess.run(["bash", "-c", f"{worker}\nwait"], **shell)
    log = (tmp_path / "a b" / "logs" / "worker-0.log").read_text()
    assert log == f"{words} --config.strategy.name=multiworker\n"
