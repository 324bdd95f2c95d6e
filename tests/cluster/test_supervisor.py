"""The supervisor, with a small program as the workers; and once with a training run."""

import re
import shlex
import signal
import subprocess
import sys

import pytest

from tests.support.launching import ROOT, make_env
from tests.support.supervision import Launch, is_alive
from tests.support.waiting import pause, wait_for
from vit_dist.cluster.supervisor import Supervisor
from vit_dist.cluster.worker import Worker

NO_RESTART = "--max_restarts=0"
SWALLOW = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); wait()"
SAVE = "on_term('saved', code=42); print('ready', flush=True); wait()"


@pytest.fixture
def launch(tmp_path):
    def start(body, *options, **more):
        started.append(Launch(tmp_path, body, *options, **more).__enter__())
        return started[-1]

    started = []
    yield start
    for one in started:
        one.__exit__()


def assert_no_worker_left(launched):
    assert not any(map(is_alive, launched.pids()))


# what is shown


def test_what_workers_print_is_shown_with_their_names_and_logged(launch):
    launched = launch("print('hello'); print('half', end='')")
    code, out, err = launched.end()
    assert (code, err) == (0, "")
    shown = [f"[worker {i}] {line}" for i in range(2) for line in ("hello", "half")]
    assert sorted(out.splitlines()) == sorted(shown)
    assert [launched.log(i) for i in range(2)] == ["hello\nhalf"] * 2


def test_a_process_alone_writes_to_the_terminal_itself(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import os, sys; print(os.environ.get('TF_CONFIG'), sys.argv[1:])")
    command = [sys.executable, "-m", "vit_dist.launch", f"--program={program}", "--", "x"]
    env = make_env(TF_CONFIG="of a cluster")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "None ['x', '--config.strategy.name=local']\n"


def test_the_mistake_of_a_process_alone_is_told_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys; print('error: no such key', file=sys.stderr); sys.exit(2)")
    command = [sys.executable, "-m", "vit_dist.launch", f"--program={program}"]
    done = subprocess.run(command, cwd=ROOT, env=make_env(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: no such key\n")


def test_what_a_workers_child_passes_on_at_the_end_is_kept(launch):
    """As the filter of TensorFlow's notices does, through which the last error runs."""
    child = "import sys; text = sys.stdin.read(); print('passed on', text)"
    body = f"""
if index == 0:
    child = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE)
    child.stdin.write(b'last words')
    child.stdin.flush()
    os._exit(3)
wait()
"""
    launched = launch(body, NO_RESTART)
    code, _, err = launched.end()
    assert code == 3
    assert launched.log(0) == "passed on last words\n"
    assert "  | passed on last words" in err


# failures


@pytest.mark.parametrize("failing", [0, 1])
def test_one_failure_ends_all_and_all_start_again(launch, failing):
    body = f"""
print('begins', started)
if not started and index == {failing}:
    wait_for('pid-{1 - failing}-0')
    print('no space left')
    sys.exit(3)
if not started:
    wait()
"""
    launched = launch(body, "--backoff=0.1")
    code, _, err = launched.end()
    assert code == 0
    lines = err.splitlines()
    # The first line names the culprit, the next ones are its last words.
    assert lines[0] == (
        f"launch: worker {failing} exited with code 3; see {launched.logs}/worker-{failing}.log"
    )
    assert lines[1:3] == ["launch:   | begins 0", "launch:   | no space left"]
    assert (
        f"launch: worker {failing} failed; SIGTERM to the workers, SIGKILL after 10 s" in lines[3]
    )
    assert lines[-1] == (
        f"launch: worker {failing} exited with code 3: starting all again in 0.1 s, from the "
        "beginning (there is no whole checkpoint) (restart 1 of 3 without a newer one)"
    )
    assert [launched.starts(i) for i in range(2)] == [2, 2]
    assert launched.log(failing).splitlines() == ["begins 0", "no space left", "begins 1"]
    assert_no_worker_left(launched)


def test_a_signal_that_kills_is_named(launch):
    launched = launch("if index: os.kill(os.getpid(), signal.SIGKILL)", NO_RESTART)
    code, _, err = launched.end()
    assert code == 137
    assert "worker 1 was killed by SIGKILL; see " in err
    assert err.endswith("worker 1 was killed by SIGKILL: not starting again\n")


def test_a_crash_loop_ends_after_so_many_restarts_each_later_than_the_one_before(launch):
    launched = launch("if index: sys.exit(7)", "--max_restarts=3", "--backoff=0.05")
    code, _, err = launched.end()
    assert code == 7
    assert re.findall(r"again in (\S+) s", err) == ["0.05", "0.1", "0.2"]
    assert launched.starts(1) == 4
    assert "not starting again, as 3 restarts brought no checkpoint newer than the begin" in err


SAVE_AND_CRASH = """
if index:
    wait_for('done')
elif started < 4:
    save({step}, torn={torn})
    sys.exit(1)
else:
    (folder / 'done').touch()
"""


def test_a_newer_checkpoint_is_progress(launch):
    body = SAVE_AND_CRASH.format(step="10 * started", torn=False)
    launched = launch(body, "--max_restarts=1", "--backoff=0")
    code, _, err = launched.end()
    assert code == 0 and launched.starts(0) == 5
    assert re.findall(r"from step (\d+) \(restart (\d)", err) == [
        (str(10 * i), "1") for i in range(4)
    ]


@pytest.mark.parametrize(("step", "torn"), [("10 * started", True), ("10 - started", False)])
def test_one_that_is_torn_or_older_is_not(launch, step, torn):
    launched = launch(
        SAVE_AND_CRASH.format(step=step, torn=torn), "--max_restarts=2", "--backoff=0"
    )
    code, *_ = launched.end()
    assert code == 1 and launched.starts(0) == 3


@pytest.mark.parametrize("order", ["mistake first", "mistake last"])
def test_a_mistake_is_not_tried_again(launch, order):
    first, last = (2, 1) if order == "mistake first" else (1, 2)
    body = f"""
if index == 0:
    wait_for('listening')
    sys.exit({first})
on_term(code={last})
(folder / 'listening').touch()
wait()
"""
    launched = launch(body)
    code, _, err = launched.end()
    assert code == 2 and "again" not in err
    assert launched.starts(0) == 1


@pytest.mark.spawns
def test_a_worker_that_cannot_be_started_is_a_failure(capfd):
    too_long = Worker("worker 1", ("x" * 200_000,), {})  # for Linux, which allows 128 KiB a word
    lasting = Worker("worker 0", (sys.executable, "-c", "import signal; signal.pause()"), {})
    supervisor = Supervisor(
        lambda: [lasting, too_long], newest_step=lambda: None, max_restarts=0, grace=0.5
    )
    assert supervisor.run() == 1
    assert "worker 1 could not be started ([Errno 7]" in capfd.readouterr().err


def test_a_log_that_cannot_be_written_does_not_end_the_run(launch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    launched = launch("print('hello')", f"--logs={tmp_path}/file")
    code, out, err = launched.end()
    assert code == 0 and out.count("hello") == 2
    assert "worker 1 has no log file" in err


# stopping


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_is_handed_on_and_nothing_starts_again(launch, name):
    launched = launch(SAVE, "--grace=20")
    launched.wait_until_ready()
    launched.send(signal.Signals[name])
    code, out, err = launched.end()
    assert code == 42
    assert out.count("saved\n") == 2
    assert f"got {name}; SIGTERM to the workers, SIGKILL after 20 s" in err
    assert launched.starts(0) == launched.starts(1) == 1
    assert_no_worker_left(launched)


def test_a_run_that_ends_just_then_is_done(launch):
    launched = launch("on_term(code=0); print('ready', flush=True); wait()")
    launched.wait_until_ready()
    launched.send(signal.SIGTERM)
    assert launched.end()[0] == 0


def test_workers_that_had_not_begun_were_stopped(launch):
    """SIGTERM's own action ends them: there was nothing to save, so the code is that of a stop."""
    launched = launch("print('ready', flush=True); wait()")
    launched.wait_until_ready()
    launched.send(signal.SIGUSR1)
    assert launched.end()[0] == 42


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_swallowed_signals_escalate(launch, number):
    launched = launch(SWALLOW, "--grace=0.5")
    launched.wait_until_ready()
    launched.send(number)
    assert launched.end()[0] == 137
    assert launched.starts(0) == 1
    assert_no_worker_left(launched)


def test_what_the_chief_lost_counts_for_more_than_what_another_saved(launch):
    launched = launch(f"if index == 0: {SWALLOW}\n{SAVE}", "--grace=0.5")
    launched.wait_until_ready()
    launched.send(signal.SIGTERM)
    assert launched.end()[0] == 137


def test_a_second_interrupt_kills(launch):
    body = "signal.signal(signal.SIGTERM, lambda *_: print('saving', flush=True))"
    launched = launch(f"{body}; print('ready', flush=True); wait()", "--grace=60")
    launched.wait_until_ready()
    launched.send(signal.SIGINT)
    wait_for(lambda: "saving" in launched.log(0))
    pause(0.2)  # two signals within 0.1 s are one press of Ctrl-C that came on two ways
    launched.send(signal.SIGINT)
    code, _, err = launched.end(30)
    assert code == 137
    assert "interrupted again" in err
    assert_no_worker_left(launched)


def test_a_worker_that_was_stopped_by_another_saves_with_the_rest_and_all_start_again(launch):
    """A scheduler takes one machine away; nobody asked the run as a whole to stop."""
    body = f"""
if index == 1 and not started:
    wait_for('run/logs/worker-0.log')
    while 'ready' not in (folder / 'run/logs/worker-0.log').read_text():
        threading.Event().wait(0.01)
    sys.exit(42)
if not started:
    {SAVE}
"""
    launched = launch(body, "--grace=20", "--backoff=0")
    code, out, err = launched.end()
    assert code == 0 and launched.starts(0) == 2
    assert "worker 1 was stopped; SIGTERM to the workers, SIGKILL after 20 s" in err
    assert "[worker 0] saved\n" in out


def test_a_signal_between_two_starts_ends_the_wait(launch):
    launched = launch("sys.exit(1)", "--backoff=1000")
    assert any("starting all again in 60 s" in line for line in launched.process.stderr)
    launched.send(signal.SIGTERM)
    assert launched.end(30)[0] == 42


def test_nohup_holds(launch):
    launched = launch(SAVE, prefix=("nohup",))
    launched.wait_until_ready()
    launched.send(signal.SIGHUP)
    launched.send(signal.SIGTERM)
    code, _, err = launched.end()
    assert code == 42
    assert "SIGHUP" not in err and "got SIGTERM" in err


def test_a_terminal_that_is_gone_does_not_end_the_supervision(launch):
    launched = launch(SAVE)
    launched.wait_until_ready()
    launched.process.stdout.close()
    launched.process.stderr.close()
    launched.send(signal.SIGHUP)
    assert launched.process.wait(30) == 42
    assert all(launched.log(i).endswith("saved\n") for i in range(2))


# nothing outlives it


def test_workers_do_not_outlive_a_supervisor_that_is_killed(launch):
    launched = launch(SWALLOW)
    launched.wait_until_ready()
    launched.send(signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, launched.pids())))
    assert len(launched.pids()) == 2


def test_what_a_worker_has_started_does_not_outlive_it(launch):
    stuck = "import signal; signal.pause()"
    body = f"""
child = subprocess.Popen([sys.executable, '-c', {stuck!r}])
(folder / f'pid-child-{{index}}').write_text(str(child.pid))
os._exit(0)
"""
    launched = launch(body)
    assert launched.end()[0] == 0
    assert len(launched.pids()) == 4
    assert_no_worker_left(launched)


# several machines


def test_two_supervisors_start_their_own_workers_and_both_start_again(tmp_path):
    """Each restarts its own share: that a worker ends is how the others' machines learn of it."""
    body = """
print('begins', started, flush=True)
wait_for(f'pid-{1 - index}-{started}')
if index == 0 and not started:
    (folder / 'lost').touch()
    os.kill(os.getpid(), signal.SIGKILL)
if not started:
    wait_for('lost')
    sys.exit('lost another worker')
"""
    hosts = "--hosts=localhost:5000,localhost:5001"
    with (
        Launch(tmp_path, body, hosts, "--host_index=0", "--backoff=0.1") as one,
        Launch(tmp_path, body, hosts, "--host_index=1", "--backoff=0.2") as other,
    ):
        ends = [one.end(), other.end()]
    assert [code for code, *_ in ends] == [0, 0]
    assert "worker 0 was killed by SIGKILL" in ends[0][2]
    assert "worker 1 exited with code 1" in ends[1][2]
    for i, (_, out, _) in enumerate(ends):
        assert (
            out
            == f"[worker {i}] begins 0\n" * 1
            + ("[worker 1] lost another worker\n" if i else "")
            + f"[worker {i}] begins 1\n"
        )


# the real thing


def test_it_needs_no_tensorflow():
    script = "import sys, vit_dist.launch; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=make_env(), check=True)


def test_what_dry_run_prints_is_what_is_started(monkeypatch, tmp_path):
    """Each line, pasted into a shell in another folder, does what the supervisor would."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "print(os.environ['TF_CONFIG'], os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[1:])"
    )
    command = [sys.executable, "-m", "vit_dist.launch", "--workers=2", "--port=5000"]
    command += [f"--program={program}", "--gpus_per_worker=1", f"--workdir={tmp_path}/a b"]

    def run(*words, cwd):
        return subprocess.run(
            words, cwd=cwd, env=make_env(PYTHONPATH=str(ROOT)), capture_output=True, text=True
        )

    started = run(*command, cwd=ROOT)
    assert started.returncode == 0, started.stderr
    logs = [(tmp_path / "a b" / "logs" / f"worker-{i}.log") for i in range(2)]
    expected = [log.read_text() for log in logs]
    for log in logs:
        log.unlink()
    shown = run(*command, "--dry-run", cwd=ROOT)
    lines = shown.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert shlex.split(line)[:3] == ["cd", str(ROOT), "&&"]
        assert run("bash", "-c", f"{line}\nwait", cwd=tmp_path).returncode == 0
    assert [log.read_text() for log in logs] == expected
