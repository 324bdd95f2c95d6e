"""A sweep runs all its variants, goes on where it was, and compares them."""

import csv
import os
import shlex
import signal
from pathlib import Path

import pytest
from etils import epath

from tests.support import processes, tiny
from vit_dist.config.errors import DataError
from vit_dist.sweep import Sweep

PRETENDED = Path(__file__).with_name("support") / "pretended.py"


def words(workdir, *flags, pretend=True):
    launch = [f"--launch=--program={PRETENDED} --max_restarts=0 --backoff=0"] if pretend else []
    return [f"--config={processes.TINY}", f"--workdir={workdir}", *launch, *flags]


def sweep(workdir, *flags, log, **options):
    return processes.run(*words(workdir, *flags, **options), module="vit_dist.sweep", log=log)


def read_table(workdir):
    with open(workdir / "sweep.csv") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def starts(run):
    return len((run / "starts").read_text().splitlines())


def test_a_run_that_fails_does_not_end_the_others(tmp_path):
    folder = tmp_path / "s"
    code, text = sweep(folder, "--set=seed=0,2,1", log=tmp_path / "log")
    assert code == 1, text
    assert "run 3 of 3: seed=1" in text and "1 of 3 runs ended with an error" in text
    rows = read_table(folder)
    assert list(rows) == ["seed=1", "seed=0", "seed=2"]  # the best first
    assert [rows[name]["val/accuracy"] for name in rows] == ["0.1", "0.0", ""]
    # The last value of each metric, also of those that are in earlier rows only.
    assert rows["seed=1"]["val/loss"] == "3.0"
    assert rows["seed=2"]["outcome"] == "exit code 2" and rows["seed=0"]["outcome"] == "done"

    # Once more: what has ended well is not run again.
    code, text = sweep(folder, "--set=seed=0,2,1", "--metric=val/loss", log=tmp_path / "again")
    assert code == 1 and [starts(folder / f"seed={i}") for i in range(3)] == [1, 1, 2]
    # Nor is it mixed with another config of the same name.
    flags = ("--config.total_steps=3", "--set=seed=0")
    code, text = sweep(folder, *flags, log=tmp_path / "other")
    assert code == 2 and "holds the run seed=0 of another sweep" in text


def test_a_signal_stops_it_and_it_goes_on(tmp_path):
    folder, log = tmp_path / "s", tmp_path / "log"
    flags = words(folder, "--set=seed=0,3,1")
    with processes.Command(*flags, module="vit_dist.sweep", log=log) as command:
        command.wait_for((folder / "seed=3" / "waits").exists)
        os.kill(command.pid, signal.SIGTERM)
        assert command.wait(60) == 42, command.text()
    assert not (folder / "seed=1").exists()
    code, text = sweep(folder, "--set=seed=0,3,1", log=tmp_path / "again")
    assert code == 0, text
    assert [starts(folder / f"seed={i}") for i in (0, 3, 1)] == [1, 2, 1]


def test_nohup_holds(monkeypatch, tmp_path):
    heard = []
    monkeypatch.setattr(Sweep, "_report", lambda self: 0)

    def run(self, name):
        # To this process itself: it would be handed on, and noted.
        os.kill(os.getpid(), signal.SIGHUP)
        heard.append(self._stopping)
        os.kill(os.getpid(), signal.SIGUSR1)
        heard.append(self._stopping)
        return 0, 0.0

    monkeypatch.setattr(Sweep, "_one", run)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert Sweep(epath.Path(tmp_path), {"a": []}, [{}]).run() == 42
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert heard == [False, True]


def test_torn_records_of_a_sweep(tmp_path):
    (tmp_path / "sweep.json").write_bytes(b'{"a": ')
    with pytest.raises(DataError, match=r"sweep.json is damaged .*: remove it, and each run"):
        Sweep(epath.Path(tmp_path), {}, [])
    (tmp_path / "sweep.json").unlink()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff{"x": 2}\n{"y": 3}\n{"z"')
    assert Sweep(epath.Path(tmp_path), {"a": []}, [{}])._metrics("a") == {"step": 1, "y": 3}


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "give what the runs differ in: --set"),
        (("--set=sead=0,1",), "there is no key 'sead'"),
        (("--set=seed=0,x",), "seed"),
        (("--set=seed=0,-1",), "seed"),
        (("--set=optimizer.learning_rate=1,-1",), "optimizer.learning_rate"),
        (("--set=total_steps=0",), "total_steps"),
        (("--set=seed=1", "--set=seed=2"), "names seed twice"),
        (("--set=seed=1", "rest"), "unexpected argument 'rest'"),
    ],
)
def test_mistakes_end_it_before_the_first_run(tmp_path, flags, said):
    code, text = sweep(tmp_path / "s", *flags, log=tmp_path / "log")
    assert code == 2 and "Traceback" not in text and text.count("error:") == 1
    assert said in text, text
    assert not (tmp_path / "s").exists()


def test_variants_of_the_config_file(tmp_path):
    file = tmp_path / "mine.py"
    lines = ["from tests.support.tiny import get_config", "def get_variants():"]
    file.write_text("\n".join([*lines, "    return [{'seed': 1}, {'total_steps': 4, 'seed': 0}]"]))
    flags = [f"--config={file}", f"--workdir={tmp_path / 's'}", "--dry_run", "--launch=--workers=2"]
    code, text = processes.run(*flags, module="vit_dist.sweep", log=tmp_path / "log")
    assert code == 0, text
    first, second = (shlex.split(line) for line in text.splitlines() if "vit_dist.launch" in line)
    assert first[2:] == [
        "vit_dist.launch",
        "--workers=2",
        f"--config={file}",
        "--config.seed=1",
        f"--workdir={tmp_path / 's' / 'seed=1'}",
    ]
    assert "--config.total_steps=4" in second and second[-1].endswith("total_steps=4,seed=0")


@pytest.mark.parametrize("rates", ["0.1", pytest.param("1e-3,0.1", marks=pytest.mark.exhaustive)])
def test_real_trainings(rates, tmp_path):
    folder = tmp_path / "s"
    flags = ["--config.total_steps=2", f"--set=optimizer.learning_rate={rates}"]
    code, text = sweep(folder, *flags, log=tmp_path / "log", pretend=False)
    assert code == 0, text[-3000:]
    rows = read_table(folder)
    assert set(rows) == {f"learning_rate={rate}" for rate in rates.split(",")}
    for name, row in rows.items():
        last = [r for r in tiny.rows(folder / name) if "val/accuracy" in r][-1]
        assert float(row["val/accuracy"]) == last["val/accuracy"]
        assert row["optimizer.learning_rate"] == name.partition("=")[2]
