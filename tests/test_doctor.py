"""The doctor passes where all is well, and names what is wrong where something is."""

import json
import re
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.clusters import free_addresses

# The smallest network, so that a step compiles in seconds.
SMALL = (
    "--quick",
    "--config.model.variant=mu/16",
    "--config.model.depth=1",
    "--config.image_size=32",
)
ORDER = [
    *("versions", "cards", "links", "alike", "devices"),
    *("collectives", "compile", "step", "memory"),
]


def test_the_page_tells_of_each_check():
    page = (Path(__file__).resolve().parents[1] / "docs" / "gpu.md").read_text()
    rows = page.split("| Check | What it does |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", rows, re.M) == [*ORDER[:-1], "throughput", "memory"]


def doctor(*flags, log, **options):
    return processes.Command(*SMALL, *flags, module="vit_dist.doctor", log=log, **options)


def verdicts(text):
    """Check -> (verdict, text), of the lines before the report."""
    found = re.findall(r"^(\w+) +(ok|WRONG|not checked)  +(.*)$", text.split("```")[0], re.M)
    return {name: (verdict, said) for name, verdict, said in found}


def assert_well(process, *, replicas):
    assert process.wait() == 0, process.text()
    found = verdicts(process.text())
    assert list(found) == ORDER
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert f"{replicas} replica(s) on CPU" in found["devices"][1]
    report = process.text().split("```text\n")[1].split("```")[0]
    assert report.startswith("processor") and all(f"\n{name} " in report for name in ORDER)
    return found


@pytest.mark.exhaustive  # with two processes, each check: test_two_hosts
@pytest.mark.parametrize("replicas", [1, 2])
def test_this_machine(replicas, tmp_path):
    flags = ["--config.strategy.name=single"]
    if replicas > 1:
        flags = [f"--config.strategy.virtual_cpus={replicas}"]
    with doctor(*flags, log=tmp_path / "log") as process:
        found = assert_well(process, replicas=replicas)
    said = "one replica" if replicas == 1 else "2 replicas agree on known sums; 16 MiB take"
    assert said in found["collectives"][1]


def environments(workers):
    tasks = [{"type": "worker", "index": i} for i in range(len(workers))]
    cluster = {"worker": workers}
    return [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": t})} for t in tasks]


def test_two_hosts(tmp_path):
    workers = free_addresses(2)
    one, two = environments(workers)
    with doctor(log=tmp_path / "0", env=one) as chief, doctor(log=tmp_path / "1", env=two) as other:
        found = assert_well(chief, replicas=2)
        assert_well(other, replicas=2)
    assert re.search(rf"worker 1 \({workers[1]}\) [\d.]+ ms, \d+ MB/s", found["links"][1])


def test_a_host_that_does_not_come(tmp_path):
    workers = free_addresses(2)
    flags = ["--config.strategy.timeout_seconds=3"]
    with doctor(*flags, log=tmp_path / "log", env=environments(workers)[0]) as process:
        assert process.wait() == 1
    found = verdicts(process.text())
    assert list(found) == ["versions", "cards", "links"]
    verdict, said = found["links"]
    assert verdict == "WRONG" and f"in vain for worker 1 ({workers[1]})" in said
    assert "WRONG: links. For a report" in process.text()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config=configs/demo.py", "error: this command has its own config and takes no file"),
        ("--config.modl=1", "error: --config.modl: there is no key 'modl'; did you mean 'model'"),
        ("--config.strategy.name=x", "error: strategy 'x' is unknown"),
        ("--config.seed=x", "error: flag --config.seed=x"),
    ],
)
def test_mistakes(flag, message, tmp_path):
    with doctor(flag, log=tmp_path / "log") as process:
        assert process.wait() == 2
    assert message in process.text()
