"""What each engine's file in launch/ asks for, and what the program does under that engine."""

import json
import os
import re
import signal
import subprocess
import types
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.support import processes, tiny
from tests.support.clusters import free_addresses
from tests.support.engines import DSTACK, SKYPILOT, cluster_spec, tf_config, without
from vit_dist.cluster.environment import find_cluster
from vit_dist.monitoring.starts import Starts
from vit_dist.run.loop import Loop

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("jobset", "jobset_tpu", "skypilot", "vertex")
COMMAND = r"-m vit_dist\.train --config \S+ --workdir \S+"


def read(name):
    return yaml.safe_load((ROOT / f"launch/{name}.yaml").read_text())


JOBSET, JOBSET_TPU = read("jobset"), read("jobset_tpu")
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB["template"]["spec"]


# the files


def check(name, manifest):
    engine = name.removesuffix("_tpu")
    schema = json.loads((ROOT / f"tools/schemas/{engine}.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(manifest)


@pytest.mark.parametrize("name", NAMES)
def test_manifests_are_what_their_engines_take(name):
    check(name, read(name))


@pytest.mark.parametrize(
    "name, path, wrong",
    [
        ("jobset", ("spec", "failurePolicy", "maxRestart"), 3),
        ("jobset", ("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        ("jobset", ("spec", "replicatedJobs", 0, "template", "spec", "completion"), 2),
        ("jobset", ("spec", "network", "subdomain"), "Vit.local"),
        ("skypilot", ("resources", "job_recovery", "recover_on_exit_code"), 42),
        ("skypilot", ("resources", "job_recovery", "recover_on_exit_codes"), [256]),
        ("skypilot", ("nodes",), 2),
        ("vertex", ("scheduling", "restartJobOnWorkerRestarts"), True),
        ("vertex", ("workerPoolSpecs", 0, "containerSpec", "image"), "x"),
        ("vertex", ("scheduling", "timeout"), 3600),
    ],
)
def test_a_slip_in_a_manifest_is_found(name, path, wrong):
    manifest = read(name)
    part = manifest
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        check(name, manifest)


def commands():
    yield " ".join(POD["containers"][0]["command"] + POD["containers"][0]["args"])
    yield read("skypilot")["run"]
    for pool in read("vertex")["workerPoolSpecs"]:
        yield " ".join(pool["containerSpec"]["command"] + pool["containerSpec"]["args"])


@pytest.mark.parametrize("command", list(commands()))
def test_commands_name_a_config_and_a_workdir_and_nothing_else(command):
    assert re.fullmatch(rf"(exec )?\S*python {COMMAND}", command.strip())


def test_the_command_under_slurm():
    """tests/cluster/test_slurm_real.py runs it."""
    text = (ROOT / "launch/slurm.sbatch").read_text()
    assert re.search(rf'"\$PYTHON" {COMMAND} \|\|', text) and "--config." not in text


def test_configs_of_the_files_exist():
    for path in (ROOT / "launch").glob("*.*"):
        for config in re.findall(r"configs/\w+\.py", path.read_text()):
            assert (ROOT / config).exists(), (path, config)


@pytest.mark.parametrize("module", ["environment", "slurm", "tf_config"])
def test_every_variable_that_is_read_is_in_the_docs(module):
    source = (ROOT / f"vit_dist/cluster/{module}.py").read_text()
    names = set(re.findall(r'"([A-Z][A-Z0-9]*_[A-Z0-9_]+)"', source))
    page = (ROOT / "docs/clusters.md").read_text()
    assert names and not {name for name in names if name not in page}


# restart rules


def jobset_action(code, *, disrupted=False):
    """What JobSet does when a pod ends so, by the rules of Kubernetes and of the manifest."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(JOB["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        what = None
        if codes and code in codes["values"]:
            what = f"Container {codes['containerName']} for pod x/y failed with exit code {code}"
        elif disrupted and {"type": "DisruptionTarget"} in conditions:
            what = "Pod x/y has condition DisruptionTarget"
        if what:
            reason, message = "PodFailurePolicy", f"{what} matching FailJob rule at index {index}"
            break
    for rule in JOBSET["spec"]["failurePolicy"]["rules"]:
        reasons = rule.get("onJobFailureReasons", [reason])
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in reasons and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    "code, disrupted, action",
    [
        (42, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (42, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (143, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (2, False, "FailJobSet"),
        (1, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
        (139, False, "RestartJobSet"),
        (24, False, "RestartJobSet"),
    ],
)
def test_what_jobset_does_after_an_exit_code(code, disrupted, action):
    assert jobset_action(code, disrupted=disrupted) == action


def test_kubernetes_takes_the_rules():
    """Each of these is refused by its webhooks otherwise."""
    (container,) = POD["containers"]
    assert POD["restartPolicy"] == "Never"  # else no podFailurePolicy
    for rule in JOB["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        assert not codes or codes["containerName"] == container["name"]
        assert not codes or codes["values"] == sorted(set(codes["values"]))
    volumes = {volume["name"] for volume in POD["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_a_tpu_slice_fails_and_restarts_as_other_jobsets_do():
    """Which rules these are is tested with launch/jobset.yaml."""
    job = JOBSET_TPU["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert JOBSET_TPU["spec"]["failurePolicy"] == JOBSET["spec"]["failurePolicy"]
    assert job["podFailurePolicy"] == JOB["podFailurePolicy"]
    assert job["parallelism"] == job["completions"]
    # GKE tells pods who they are if they have a stable name: the Job is indexed, with a subdomain.
    assert job["completionMode"] == "Indexed" and JOBSET_TPU["spec"]["network"]["subdomain"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_pod_of_a_tpu_slice_starts_worker_and_program(index, tmp_path):
    (container,) = JOBSET_TPU["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    fake = tmp_path / "python"
    fake.write_text('#!/usr/bin/env bash\necho "$@"\n')
    fake.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TPU_WORKER_ID": str(index)}
    words = container["command"] + container["args"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    started = set(done.stdout.splitlines())
    flags = " ".join(container["args"])
    trained = f"-m vit_dist.train {flags} --config.strategy.name=tpu"
    assert started == {"-m vit_dist.tpu_worker", *([] if index else [trained])}


def test_what_skypilot_and_vertex_do():
    recovery = read("skypilot")["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [42] and recovery["max_restarts_on_errors"] > 0
    vertex = read("vertex")
    assert vertex["scheduling"]["restartJobOnWorkerRestart"] is True
    assert vertex["workerPoolSpecs"][0]["replicaCount"] == 1  # the chief's pool


# the program under each engine


def test_pods_find_each_other_by_the_names_of_the_headless_service():
    (container,) = POD["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    job = f"{JOBSET['metadata']['name']}-{JOBSET['spec']['replicatedJobs'][0]['name']}-0"
    (port,) = [entry["containerPort"] for entry in container["ports"]]
    names = [
        f"{job}-{i}.{JOBSET['spec']['network']['subdomain']}:{port}"
        for i in range(JOB["completions"])
    ]
    assert JOB["parallelism"] == JOB["completions"]
    for i in range(JOB["completions"]):
        # HOSTNAME and the rest are there, too, and say nothing that is needed.
        pod = {**given, "JOB_COMPLETION_INDEX": str(i), "HOSTNAME": f"{job}-{i}"}
        found = find_cluster(pod)
        assert found.workers == tuple(names) and found.index == i


@pytest.fixture
def started(tmp_path):
    """Starts `python -m vit_dist.train` with the variables of an engine."""
    running = []

    def start(environ, *flags, workdir="run"):
        log = tmp_path / f"{len(running)}.log"
        given = (f"--config={processes.TINY}", f"--workdir={tmp_path / workdir}", *flags)
        environ = {"TF_CONFIG": "", **environ}
        command = processes.Command(*given, "--config.strategy.name=auto", log=log, env=environ)
        running.append(command)
        return command

    yield start
    for command in running:
        command.__exit__()


LOOPBACK = "127.0.0.1\n127.0.0.2"
TWO = ["localhost:23801", "localhost:23802"]
# As a process that is not the chief gets them.
SECOND = {
    "SkyPilot": {**SKYPILOT, "SKYPILOT_NODE_IPS": LOOPBACK},
    "dstack": {**DSTACK, "DSTACK_NODES_IPS": LOOPBACK, "DSTACK_NODE_RANK": "1"},
    "VIT_DIST_HOSTS": {
        "VIT_DIST_HOSTS": "localhost:[23801-23802]",
        "JOB_COMPLETION_INDEX": "1",
    },
    "TF_CONFIG": tf_config({"chief": TWO[:1], "worker": TWO[1:]}),
    "Vertex AI": cluster_spec({"workerpool0": TWO[:1], "workerpool1": TWO[1:]}, "workerpool1"),
}


@pytest.mark.parametrize("engine", SECOND)
def test_a_chief_that_never_comes(started, engine):
    """Exit code 1: another start may help. The message names the host, in the time given."""
    host = started(SECOND[engine], "--config.strategy.timeout_seconds=2")
    assert host.wait() == 1
    chief = r"(127\.0\.0\.1:2222|localhost:23801)"
    assert re.search(rf"waited 2 s in vain for worker 0 \({chief}\)", host.text())
    assert f"({engine})" in host.text() and f"{engine} says that this is worker 1" in host.text()


@pytest.mark.parametrize("engine", SECOND)
def test_a_signal_before_the_hosts_have_met(started, engine):
    """Exit code 42: start again, without counting it."""
    host = started(SECOND[engine])
    host.wait_for(lambda: "says that this is worker 1" in host.text())
    os.kill(host.pid, signal.SIGTERM)
    assert host.wait() == 42


BROKEN = {
    "SkyPilot": without(SKYPILOT, "SKYPILOT_NODE_RANK"),
    "dstack": {**DSTACK, "DSTACK_NODES_NUM": "3"},
    "Indexed Job": {"JOB_COMPLETION_INDEX": "1"},
    "TF_CONFIG": {"TF_CONFIG": "{"},
    "Vertex AI": cluster_spec({"workerpool0": TWO[:1], "workerpool2": TWO[1:]}),
    "Slurm": {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"},
    "GKE": {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"},
}


@pytest.mark.parametrize("engine", BROKEN)
def test_variables_that_cannot_be(started, engine):
    """Exit code 2: another start would end the same way."""
    host = started(BROKEN[engine])
    assert host.wait() == 2
    assert len([x for x in host.text().splitlines() if x.startswith("error: ")]) == 1


def test_the_other_hosts_wait_for_the_chiefs_checkpoint(monkeypatch):
    """The first that leaves may be the end of all: JobSet, SkyPilot and Vertex AI stop the rest."""
    order = []
    monkeypatch.setattr("vit_dist.run.loop.all_hosts", lambda strategy, number: order.append("met"))
    loop = types.SimpleNamespace(
        strategy=None,
        watchdog=types.SimpleNamespace(progress=lambda *args: None),
        checkpointer=types.SimpleNamespace(wait=lambda: order.append("written")),
        best=types.SimpleNamespace(wait=lambda: order.append("best written")),
        starts=Starts(),
    )
    Loop.finish_saving(loop, 5)
    assert order == ["written", "best written", "met"]


@pytest.mark.exhaustive  # its parts: test_elastic.py, test_torture.py, test_slurm_real.py
@pytest.mark.timeout(900)
def test_pods_that_are_stopped_go_on_as_if_they_had_not(started, tmp_path):
    """What Kubernetes does by launch/jobset.yaml: SIGTERM to a pod, and all pods start again."""
    ports = [address.rpartition(":")[2] for address in free_addresses(2)]
    hosts = ",".join(f"localhost:{port}" for port in ports)
    flags = (
        "--config.total_steps=600",
        "--config.log_steps=20",
        "--config.data.val_split=",
        "--config.step.ema_decay=0.99",
    )

    def start_all(workdir):
        pods = [{"VIT_DIST_HOSTS": hosts, "JOB_COMPLETION_INDEX": str(i)} for i in range(2)]
        return [started(pod, *flags, workdir=workdir) for pod in pods]

    assert [host.wait() for host in start_all("undisturbed")] == [0, 0]
    chief, other = start_all("stopped")
    chief.wait_for(lambda: "step 20/" in chief.text(), seconds=280)
    os.kill(other.pid, signal.SIGTERM)
    assert [chief.wait(), other.wait()] == [42, 42]
    assert jobset_action(42) == "RestartJobSetAndIgnoreMaxRestarts"
    assert [host.wait() for host in start_all("stopped")] == [0, 0]
    found, expected = (tiny.arrays(tmp_path / name) for name in ("stopped", "undisturbed"))
    tiny.assert_same(found, expected, atol=0)
