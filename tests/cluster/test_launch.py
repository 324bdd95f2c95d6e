"""The launchers: exact commands, clear errors, how workers stop; TensorFlow only at the end."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import launch, make_env
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "python -m vit_dist.train"
FLAGS = ("--config", "configs/demo.py", "--workdir", "runs/x")
SHOWN = " ".join(FLAGS)
TPU = {"TPU_NAME": "vit", "TPU_ZONE": "us-west4-a"}
CD = f"cd {ROOT} && "


def dry_run(script, *args, **variables):
    done = launch(script, "--dry-run", *args, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def tf_config(workers, index):
    cluster = ", ".join(f'"{worker}"' for worker in workers)
    task = f'{{"type": "worker", "index": {index}}}'
    return f'{{"cluster": {{"worker": [{cluster}]}}, "task": {task}}}'


# dry runs

LOCAL = f"{CD}env -u TF_CONFIG -u TPU_NAME {TRAIN}"
LOCAL_CPU = f"{CD}env -u TF_CONFIG -u TPU_NAME CUDA_VISIBLE_DEVICES=-1 {TRAIN}"
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
            (*FLAGS, "--config.seed", "-1", "--config.pp=flip|keep('a b')", "--", "--v=1", "x"),
            f"{LOCAL} {SHOWN} --config.seed -1 "
            "'--config.pp=flip|keep('\\''a b'\\'')' --v=1 x --config.strategy.name=local",
        ),
    ],
)
def test_local_command(args, line):
    (shown,) = dry_run("local.sh", *args)
    assert shown == line


def test_workers_on_one_machine():
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
    lines = dry_run("workers.sh", "--workers", 3, *FLAGS, PYTHON=sys.executable)
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
            ("run", "--config", "configs/x.py", "--workdir", "gs://b/a c"),
            f"{GCLOUD} ssh vit --worker=all "
            "'--command=cd vit_dist || exit; nohup .venv/bin/python -u -m vit_dist.train "
            "--config configs/x.py --workdir '\\''gs://b/a c'\\'' --config.strategy.name=tpu "
            "--config.strategy.tpu=local >> train.log 2>&1 < /dev/null & "
            "echo started as process $!' --zone=us-west4-a",
        ),
        (
            ("logs",),
            f"{GCLOUD} ssh vit --worker=all '--command=tail -n 100 -F vit_dist/train.log' "
            "--zone=us-west4-a",
        ),
        (("ssh",), f"{GCLOUD} ssh vit --zone=us-west4-a"),
        (("delete",), f"{GCLOUD} delete vit --quiet --zone=us-west4-a"),
    ],
)
def test_tpu_vm_command(args, line):
    assert dry_run("tpu_vm.sh", *args, **TPU) == [line]


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
        ("local.sh", ("--cpuz", 2), "unknown option '--cpuz'"),
        ("local.sh", ("--cpus", "two"), "--cpus needs a whole number, not 'two'"),
        ("local.sh", ("--cpus=0",), "--cpus needs at least 1"),
        ("local.sh", ("--cpus",), "--cpus needs a value"),
        ("local.sh", ("demo.py",), "unexpected 'demo.py'"),
        ("local.sh", ("--config",), "--config needs a value"),
        ("local.sh", (), "--config is missing: give --config FILE and --workdir DIR (see --help)"),
        ("local.sh", ("--config=x",), "--workdir is missing"),
        ("local.sh", ("--cpus=2", *FLAGS, "--config.strategy.name=single"), "is set by --cpus"),
        ("workers.sh", FLAGS, "give --workers N, or --hosts LIST and --index I"),
        ("workers.sh", ("--workers=0", *FLAGS), "--workers needs at least 1"),
        ("workers.sh", ("--workers=2", "--hosts=a:1"), "give one of them"),
        ("workers.sh", ("--hosts=a:1,b", "--index=0"), "not 'b'"),
        ("workers.sh", ("--hosts=a:1,b:2"), "--hosts needs --index"),
        ("workers.sh", ("--hosts=a:1,b:2", "--index=2"), "--index 2 is out of range"),
        ("workers.sh", ("--hosts=a:1", "--index=0", "--port=1"), "belong to --workers"),
        ("tpu_vm.sh", (), "say what to do"),
        ("tpu_vm.sh", ("crate",), "unexpected 'crate'"),
        ("tpu_vm.sh", ("ssh", "--name="), "give --name"),
        ("tpu_vm.sh", ("create",), "create needs --type"),
        ("tpu_vm.sh", ("create", "--type=v5litepod-16"), "has several hosts"),
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
    assert message in done.stderr and done.stderr.startswith(f"{script}: ")


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


# supervision, with a program that stands in for Python


def hear_sigint():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the background jobs of a script ignore


@pytest.fixture
def start(tmp_path):
    """Starts two workers that run `body`, in which $index is the worker's number."""
    started = []

    def start(body, *options, prefix=()):
        fake = tmp_path / "python"
        fake.write_text(
            "#!/usr/bin/env bash\nindex=${TF_CONFIG##*: }; index=${index%%\\}*}\n"
            f"echo $$ > {tmp_path}/pid-$index\necho hello from $index\n{body}\n"
        )
        fake.chmod(0o755)
        args = ("--workers=2", "--port=5000", f"--workdir={tmp_path}/run", *options)
        started.append(
            subprocess.Popen(
                [*prefix, ROOT / "launch" / "workers.sh", *args],
                env=make_env(PYTHON=str(fake)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                preexec_fn=hear_sigint,
            )
        )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


def wait_until_running(tmp_path):
    logs = [tmp_path / "run" / "logs" / f"worker-{i}.log" for i in range(2)]
    wait_for(lambda: all(log.exists() and "ready" in log.read_text() for log in logs))


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Killed along with its parent, it may wait for a new one to notice.
    return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()


def assert_no_worker_left(tmp_path):
    for path in tmp_path.glob("pid-*"):
        assert not is_alive(int(path.read_text()))


STUCK = "while :; do sleep 0.05; done"
SWALLOW = f"trap '' TERM; echo ready; {STUCK}"


def test_first_worker_is_live_and_all_have_logs(start, tmp_path):
    out, err = (process := start("")).communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "hello from 0\n", "")
    for i in range(2):
        assert (tmp_path / "run" / "logs" / f"worker-{i}.log").read_text() == f"hello from {i}\n"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_worker_ends_the_others(start, tmp_path, failing):
    until_both = f"until [[ -e {tmp_path}/pid-{1 - failing} ]]; do sleep 0.05; done"
    body = f"((index == {failing})) && {{ {until_both}; exit 3; }}; {SWALLOW}"
    process = start(body, "--grace=1")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert f"worker {failing} exited with code 3; see {tmp_path}/run/logs" in err
    assert_no_worker_left(tmp_path)


def test_a_worker_that_was_stopped_leaves_the_others_time_to_save(start, tmp_path):
    until_ready = f"until grep -q ready {tmp_path}/run/logs/worker-0.log; do sleep 0.05; done"
    body = f"((index)) && {{ {until_ready}; exit 42; }}; trap 'echo saved; exit 42' TERM; "
    process = start(body + f"echo ready; {STUCK}", "--grace=20")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 42
    assert "worker 1 was stopped; SIGTERM to the workers, SIGKILL after 20 s" in err
    assert out.endswith("saved\n")


def test_a_killed_worker_shows_in_the_exit_code(start, tmp_path):
    process = start("((index == 1)) && kill -KILL $$; exit 0")
    process.communicate(timeout=30)
    assert process.returncode == 137


SAVE = f"trap 'echo saved; exit 42' TERM; echo ready; {STUCK}"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_is_handed_on(start, tmp_path, name):
    process = start(SAVE, "--grace=20")
    wait_until_running(tmp_path)
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=15)
    assert process.returncode == 42
    assert out == "hello from 0\nready\nsaved\n"
    assert f"got {name}; SIGTERM to the workers, SIGKILL after 20 s" in err
    assert_no_worker_left(tmp_path)


def test_a_run_that_ends_just_then_is_done(start, tmp_path):
    process = start(f"trap 'exit 0' TERM; echo ready; {STUCK}", "--grace=20")
    wait_until_running(tmp_path)
    process.terminate()
    process.communicate(timeout=15)
    assert process.returncode == 0


def test_workers_that_had_not_begun_were_stopped(start, tmp_path):
    """SIGTERM's own action ends them: there was nothing to save, so the code is that of a stop."""
    process = start(f"echo ready; {STUCK}", "--grace=20")
    wait_until_running(tmp_path)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=15)
    assert process.returncode == 42


def test_a_second_interrupt_kills(start, tmp_path):
    process = start(f"trap 'echo saving' TERM; echo ready; {STUCK}", "--grace=60")
    wait_until_running(tmp_path)
    process.send_signal(signal.SIGINT)
    log = tmp_path / "run" / "logs" / "worker-0.log"
    wait_for(lambda: "saving" in log.read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 137
    assert "interrupted again" in err
    assert_no_worker_left(tmp_path)


def test_what_the_chief_lost_counts_for_more_than_what_another_saved(start, tmp_path):
    """Worker 0 hears nothing and is killed, worker 1 says that all is saved."""
    process = start(f"((index)) || {{ {SWALLOW}; }}; {SAVE}", "--grace=1")
    wait_until_running(tmp_path)
    process.terminate()
    process.communicate(timeout=15)
    assert process.returncode == 137


def test_nohup_holds(start, tmp_path):
    process = start(SAVE, prefix=("nohup",))
    wait_until_running(tmp_path)
    process.send_signal(signal.SIGHUP)
    process.terminate()
    _, err = process.communicate(timeout=15)
    assert process.returncode == 42
    assert "SIGHUP" not in err and "got SIGTERM" in err


def test_workers_do_not_outlive_a_launcher_that_is_killed(start, tmp_path):
    process = start(SWALLOW)
    wait_until_running(tmp_path)
    process.kill()
    process.wait(timeout=15)
    workers = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    assert len(workers) == 2
    wait_for(lambda: not any(map(is_alive, workers)))


def test_a_terminal_that_is_gone_does_not_end_the_supervision(start, tmp_path):
    process = start(SAVE, "--grace=20")
    wait_until_running(tmp_path)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=15) == 42
    for i in range(2):
        assert (tmp_path / "run" / "logs" / f"worker-{i}.log").read_text().endswith("saved\n")


def test_what_dry_run_prints_works_in_any_folder(tmp_path):
    """The command itself is taken for its words: it need not train."""
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\necho "$PWD $*"\n')
    fake.chmod(0o755)
    flags = ("--config=c.py", f"--workdir={tmp_path}/a b")
    (local,) = dry_run("local.sh", *flags, PYTHON=str(fake))
    (worker,) = dry_run("workers.sh", "--workers=1", "--port=1", *flags, PYTHON=str(fake))
    words = f"{ROOT} -m vit_dist.train --config=c.py --workdir={tmp_path}/a b"
    shell = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    shown = subprocess.run(["bash", "-c", local], **shell).stdout
    assert shown == f"{words} --config.strategy.name=local\n"
    subprocess.run(["bash", "-c", f"{worker}\nwait"], **shell)
    log = (tmp_path / "a b" / "logs" / "worker-0.log").read_text()
    assert log == f"{words} --config.strategy.name=multiworker\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_swallowed_signals_escalate(start, tmp_path, number):
    process = start(SWALLOW, "--grace=1")
    wait_until_running(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=15)
    assert process.returncode == 137
    assert_no_worker_left(tmp_path)
