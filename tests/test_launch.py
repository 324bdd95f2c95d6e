"""The command that starts workers: whose flag each word is, and what is started."""

import json

import numpy as np
import pytest
from absl import flags

from vit_dist import launch
from vit_dist.config.errors import ConfigError
from vit_dist.training.checkpoint import Checkpointer


@pytest.mark.parametrize(
    ("words", "own", "train"),
    [
        ("--workers 2 --config c.py", "--workers 2", "--config c.py"),
        ("--config=c.py --workers=2", "--workers=2", "--config=c.py"),
        ("--gpus-per-worker=1 --dry-run", "--gpus_per_worker=1 --dry_run", ""),
        ("--config.seed -1 --grace 5", "--grace 5", "--config.seed -1"),
        ("--config.a.b --dry_run", "--dry_run", "--config.a.b"),
        ("--workdir w -- --grace=1 x", "", "--workdir w --grace=1 x"),
        ("--configs=1", "--configs=1", ""),
        ("x", "x", ""),
    ],
)
def test_whose_flag_a_word_is(words, own, train):
    assert launch.split_arguments(words.split()) == (own.split(), train.split())


@pytest.mark.parametrize("words", [["--config"], ["--workdir", "--workers=2"]])
def test_a_flag_without_its_value(words):
    with pytest.raises(ConfigError, match=f"{words[0]} needs a value"):
        launch.split_arguments(words)


@pytest.fixture
def started(monkeypatch):
    """The workers that a command line would start."""
    values = flags.FlagValues()
    for name in ("DEFINE_integer", "DEFINE_string", "DEFINE_float", "DEFINE_boolean"):
        define = getattr(flags, name)
        monkeypatch.setattr(flags, name, lambda *a, d=define, **k: d(*a, **k, flag_values=values))
    alias = flags.DEFINE_alias
    monkeypatch.setattr(flags, "DEFINE_alias", lambda *a: alias(*a, flag_values=values))
    monkeypatch.setattr(launch, "FLAGS", values)
    launch.define_flags()

    def start(*words, workdir="runs/x"):
        values(["launch", *words])
        return launch.make_workers([], workdir)

    return start


def tasks(workers):
    return [json.loads(worker.environment["TF_CONFIG"]) for worker in workers]


def test_ports_are_others_at_each_start(started):
    first, again = (tasks(started("--workers=3")) for _ in range(2))
    assert first[0]["cluster"] != again[0]["cluster"]
    assert [t["task"]["index"] for t in first] == [0, 1, 2]


def test_all_entries_of_this_machine_are_started_here(started, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    workers = started("--hosts=192.0.2.1,localhost:5,127.0.0.1:6", "--gpus_per_worker=2")
    assert [w.name for w in workers] == ["worker 1", "worker 2"]
    assert [w.environment["CUDA_VISIBLE_DEVICES"] for w in workers] == ["0,1", "2,3"]
    everyone = ["192.0.2.1:2222", "localhost:5", "127.0.0.1:6"]
    assert all(t["cluster"] == {"worker": everyone} for t in tasks(workers))


def test_no_gpus(started):
    (worker,) = started("--workers=1", "--gpus_per_worker=0")
    assert worker.environment["CUDA_VISIBLE_DEVICES"] == "-1"


@pytest.mark.parametrize(
    ("given", "expected"),
    [("4,5,6,7", ["4,5", "6,7"]), ("GPU-a, GPU-b,3,GPU-c,0", ["GPU-a,GPU-b", "3,GPU-c"])],
)
def test_workers_share_the_gpus_that_the_user_left_them(started, monkeypatch, given, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    workers = started("--workers=2", "--gpus_per_worker=2")
    assert [w.environment["CUDA_VISIBLE_DEVICES"] for w in workers] == expected


@pytest.mark.parametrize(("given", "left"), [("4,5,6", 3), ("4,5,-1,6", 2), ("-1", 0), ("", 0)])
def test_too_few_gpus_for_the_workers(started, monkeypatch, given, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    with pytest.raises(ConfigError, match=f"takes 4 GPUs of .*='{given}' leaves {left}: "):
        started("--workers=2", "--gpus_per_worker=2")


@pytest.mark.parametrize("words", [(), ("--logs=~no.such.user/x/logs",)])
def test_the_home_of_nobody_is_a_name(started, words):
    """As the run itself takes it: vit_dist.paths.expand."""
    (worker,) = started("--workers=1", *words, workdir="~no.such.user/x")
    assert str(worker.log) == "~no.such.user/x/logs/worker-0.log"


def test_one_process_knows_of_no_cluster(started):
    (worker,) = started()
    assert worker.environment == {"TF_CONFIG": None, "TPU_NAME": None}
    assert worker.log is None


@pytest.mark.spawns
@pytest.mark.exhaustive
def test_a_bucket_without_a_checkpoint(remote):
    assert launch.newest_step(str(remote)) is None


@pytest.mark.spawns
def test_the_newest_checkpoint_of_a_bucket(remote):
    """TensorFlow alone can look there, in a process of its own."""
    checkpointer = Checkpointer(remote)
    checkpointer.save({"model/w": np.zeros(3, np.float32)}, step=7, notes={})
    checkpointer.wait()
    assert launch.newest_step(str(remote)) == 7
