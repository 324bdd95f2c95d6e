"""A TPU slice of two hosts on loopback: real workers and TensorFlow servers, CPUs for chips."""

import functools
import json
import os
import re
import signal
import socket
import threading
import time

import numpy as np
import pytest

from tests.support import images, processes, tiny, tpu
from tests.support.datasets import prepare_dummy
from vit_dist.cluster import tpu_slice
from vit_dist.cluster.line import Line
from vit_dist.cluster.strategy import connect_tpu, find_slice
from vit_dist.config.errors import ConfigError, DataError, HostLostError
from vit_dist.data.pipeline import train_indices
from vit_dist.run.check import check
from vit_dist.run.facts import code_facts
from vit_dist.run.input import eval_data, train_data
from vit_dist.run.tpu_hosts import check_reading
from vit_dist.train import train

BATCH, HOSTS = 12, 2
PER_REPLICA = BATCH // (HOSTS * tpu.CORES)
OPS = "decode|resize(size)|value_range(-1, 1)|keep('image', 'label', 'index')"
ARRAYS = OPS.removeprefix("decode|resize(size)|")


def write_data(root):
    """Keys of the config for each source; 20 examples in a split."""
    for split in ("train", "val"):
        images.write_folder(root / "folder", count=20, split=split)
    images.write_tfrecords(root / "records", (9, 11), num_classes=2)
    records = {"data__files": f"{root}/records/train-*", "data__num_classes": 2}
    noise = {"num_examples": 20, "num_classes": 4, "height": 8, "width": 8, "image_format": "array"}
    dummy = prepare_dummy(root / "tfds", "tfrecord")
    return {
        "folder": {"data__data_dir": f"{root}/folder", "data__val_split": "val"},
        "tfrecord": {**records, "data__val_split": "train"},
        "tfds": {
            "data__name": dummy["name"],
            "data__data_dir": dummy["data_dir"],
            "data__val_split": "test",
        },
        "synthetic": {"data__options": noise, "data__val_split": "val"},
    }


def options_of(source, keys):
    ops = ARRAYS if source == "synthetic" else OPS
    given = {"input__train_ops": ops, "input__eval_ops": ops, "data__test_split": ""}
    return check(
        tiny.make(
            data__source=source,
            input__batch_size=BATCH,
            input__eval_batch_size=BATCH,
            total_steps=4,
            **given,
            **keys,
        )
    )


def read_epochs(name, data, output):
    """The program: examples of each source by [step][host][replica], for training and evaluation.

    The strategy is a real TPUStrategy whose cores are not there; its hosts are.
    """
    hosts = find_slice("tpu", name)
    asked = []
    with tpu_slice.open_slice(
        hosts, facts=code_facts(), timeout_seconds=60, asked=asked.append
    ) as lines:
        strategy = tpu.tpu_strategy(connect_tpu(name), HOSTS)
        found = {}
        for source, keys in data.items():
            options, opened = options_of(source, keys)
            check_reading(opened.sources, strategy, lines.addresses)
            train, val = opened.sources["train"], opened.sources["val"]
            steps = -(-train.num_examples // BATCH) + 1  # more than an epoch
            batches = iter(train_data(options, opened, strategy, first_step=0))
            trained = [places(strategy, next(batches)) for _ in range(steps)]
            judged = eval_data(options.evaluation, opened, strategy, "val")
            # Twice: a data set is kept for later evaluations.
            passes = [[places(strategy, b, masked=True) for b in judged] for _ in range(2)]
            found[source] = {
                "train": trained,
                "order": train_indices(
                    train, batch_size=BATCH, seed=options.seed, first_step=0, num_steps=steps
                ).tolist()
                if train.indexable
                else None,
                "val": passes,
                "counts": [train.num_examples, val.num_examples],
            }
        assert lines.lost(0) is None and not asked
        output.write_text(json.dumps(found))


def places(strategy, batch, *, masked=False):
    """[(host, numbers of its examples)] of a batch's replicas, without padding."""
    results = strategy.experimental_local_results(batch["index"])
    masks = strategy.experimental_local_results(batch["mask"]) if masked else [None] * len(results)
    made = []
    for numbers, mask in zip(results, masks, strict=True):
        host = int(re.search(r"task:(\d+)", numbers.device)[1])
        keep = np.ones(numbers.shape, bool) if mask is None else mask.numpy() > 0
        made.append((host, numbers.numpy()[keep].tolist()))
    return made


# A source whose examples have places, one that is a stream; the others are read as they are.
SOURCES = ("folder", "tfrecord")
FURTHER = ("tfds", "synthetic")


@pytest.fixture(autouse=True)
def forget_slices(monkeypatch):
    """A process that had a slice leaves in haste, which the process of all tests must not do."""
    monkeypatch.setattr(tpu_slice, "_opened", False)


@pytest.fixture(scope="module")
def epochs(tmp_path_factory):
    """epochs(source): what the slice read of it; how the workers ended, and what they printed."""

    @functools.cache
    def read(sources):
        root = tmp_path_factory.mktemp("slice")
        data = {name: keys for name, keys in write_data(root).items() if name in sources}
        with tpu.workers(root) as (running, name):
            output = root / "found.json"
            code, text = processes.call(read_epochs, name, data, output, log=root / "log")
            assert code == 0, text[-3000:]
            codes = [worker.wait(60) for worker in running]
        return json.loads(output.read_text()), codes, [worker.text() for worker in running]

    def get(source):
        found, codes, texts = read(SOURCES if source in SOURCES else FURTHER)
        return found[source], codes, texts

    return get


ALL_SOURCES = [*SOURCES, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in FURTHER)]


@pytest.mark.spawns
@pytest.mark.compiles
@pytest.mark.parametrize("source", ALL_SOURCES)
def test_each_host_reads_the_examples_that_law_1_gives_it(epochs, source):
    found, *_ = epochs(source)
    for step in found["train"]:
        assert [host for host, _ in step] == [0, 0, 1, 1]
        assert {len(numbers) for _, numbers in step} == {PER_REPLICA}
    read = [n for step in found["train"] for _, numbers in step for n in numbers]
    if found["order"] is not None:
        # Position p = step * batch_size + replica * b + j, as data/pipeline.py numbers a run.
        assert read == found["order"]
    count = found["counts"][0]
    assert sorted(read[:count]) == list(range(count))


@pytest.mark.spawns
@pytest.mark.compiles
@pytest.mark.parametrize("source", ALL_SOURCES)
def test_an_evaluation_reads_every_example_once_and_can_be_done_again(epochs, source):
    found, *_ = epochs(source)
    count = found["counts"][1]
    for batches in found["val"]:
        assert [host for host, _ in batches[0]] == [0, 0, 1, 1]
        read = [n for batch in batches for _, numbers in batch for n in numbers]
        assert read == list(range(count))


@pytest.mark.spawns
@pytest.mark.compiles
def test_workers_end_with_their_program(epochs):
    _, codes, texts = epochs(SOURCES[0])
    assert codes == [0, 0]
    assert all("ready: waiting for the program at port" in text for text in texts)


# the whole command, which computes on the hosts' CPUs


def program(*flags):
    tpu.compute_on_cpus()
    processes.main("vit_dist.train", *flags)


def flags_of(name, workdir, *more):
    return (
        f"--config={processes.TINY}",
        f"--workdir={workdir}",
        "--config.strategy.name=tpu",
        f"--config.strategy.tpu={name}",
        "--config.model.dropout=0.0",
        "--config.data.val_split=",
        *more,
    )


ENDLESS = "--config.total_steps=1000000"


def has_begun(text):
    """Whether this start has trained and saved: a log after the first."""
    return len(re.findall(r"step \d+/", text)) >= 2


def stop_worker(folder, number, log):
    """Starts workers and program, sends worker 1 a signal, and waits until the program has ended.

    Returns:
      (the program's exit code and text, the workers' exit codes, the port of worker 1); where the
      signal kills, its exit code is that of the other worker alone.
    """
    with tpu.workers(folder) as (running, name):
        flags = flags_of(name, folder / "run", ENDLESS, "--config.save_steps=4")
        with processes.Call(program, *flags, log=folder / log) as running_program:
            running_program.wait_for(lambda: has_begun(running_program.text()))
            os.kill(running[1].pid, number)
            code, text = running_program.wait(120), running_program.text()
        left = running[:1] if number == signal.SIGKILL else running
        codes = [worker.wait(60) for worker in left]
    return code, text, codes, name.rpartition(":")[2]


@pytest.mark.spawns
@pytest.mark.compiles
def test_a_worker_is_stopped_and_another_is_killed_and_the_run_is_as_of_one_process(tmp_path):
    """The same command goes on, and what it saves is what a process alone has at that step."""
    # The host of a worker is taken away: all leave with 42.
    code, text, codes, port = stop_worker(tmp_path, signal.SIGTERM, "log")
    assert (code, codes) == (42, [42, 42]), text[-3000:]
    assert f"asked to stop: SIGTERM on TPU host 1 (127.0.0.1:{port})" in text
    step = tiny.open_checkpoint(str(tmp_path / "run")).step

    # The other worker does not stay for a program that is gone.
    code, text, codes, port = stop_worker(tmp_path, signal.SIGKILL, "log2")
    assert (code, codes) == (1, [1]), text[-3000:]
    assert f"resumed from step {step}" in text
    (message,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert f"TPU host 1 (127.0.0.1:{port}): its worker is gone" in message
    assert "Start all" in message

    saved = tiny.open_checkpoint(str(tmp_path / "run"))
    assert saved.step > step
    changed = {"model__dropout": 0.0, "total_steps": saved.step}
    train(tiny.without_evaluation(**changed), str(tmp_path / "alone"))
    tiny.assert_same(saved.arrays, tiny.arrays(tmp_path / "alone"), atol=2e-4)


def read_elsewhere(name, folder):
    """The program: host 1 is led to believe that an image is another than host 0 reads."""
    tiny.make_folder(folder)
    _, data = check(tiny.of_folder(folder))
    source = data.sources["train"]
    hosts = find_slice("tpu", name)
    with tpu_slice.open_slice(hosts, facts=code_facts(), timeout_seconds=60, asked=print):
        strategy = tpu.tpu_strategy(connect_tpu(name), HOSTS)
        check_reading(data.sources, strategy, hosts)
        read, seen = source.read, []

        def other(index):
            seen.append(index)
            # The last host reads the first example in the place of each.
            return read(index if len(seen) <= 8 else index * 0)

        source.read = other
        try:
            check_reading({"train": source}, strategy, hosts)
        except DataError as error:
            print(f"said: {error}", flush=True)


@pytest.mark.spawns
def test_a_host_that_reads_other_examples_is_named(tmp_path):
    with tpu.workers(tmp_path) as (_, name):
        code, text = processes.call(read_elsewhere, name, tmp_path / "data", log=tmp_path / "log")
    port = name.rpartition(":")[2]
    said = (
        f"said: TPU host 1 (127.0.0.1:{port}) reads other examples of folder:train. The data must"
    )
    assert code == 0 and said in text, text[-2000:]


# what is refused before anything starts


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"input__cache": "raw"}, "cannot read .* from config.input.cache: that calls Python"),
        ({"input__on_bad_example": "mask"}, "does not go with config.input.on_bad_example='mask'"),
        ({"input__service": "a:1"}, "does not go with config.input.service"),
    ],
)
def test_what_calls_python_is_refused_on_a_slice(changed, message, tmp_path):
    tiny.make_folder(tmp_path)
    slice_of_two = {"strategy__name": "tpu", "strategy__tpu": "grpc://a:8470,grpc://b:8470"}
    with pytest.raises(ConfigError, match=f"a TPU slice of several hosts {message}"):
        check(tiny.of_folder(tmp_path, **slice_of_two, **changed))
    alone = {"strategy__name": "tpu", "strategy__tpu": "grpc://a:8470"}
    check(tiny.of_folder(tmp_path, **alone))


def test_sources_in_python_are_refused_on_a_slice(tmp_path):
    keys = prepare_dummy(tmp_path, "array_record")
    with pytest.raises(ConfigError, match="It takes demo, folder, raw, synthetic, tfrecord"):
        check(
            tiny.make(
                data__source="tfds",
                data__name=keys["name"],
                data__data_dir=keys["data_dir"],
                data__val_split="test",
                input__train_ops=f"decode|{tiny.ANY_SIZE}",
                input__eval_ops=f"decode|{tiny.ANY_SIZE}",
                strategy__name="tpu",
                strategy__tpu="grpc://a:8470,grpc://b:8470",
            )
        )


# the lines between program and workers, without TensorFlow


class FakeWorker:
    """The worker's part, in a thread."""

    def __init__(self, *, facts, reason=lambda: None, patience=30.0):
        (self.port,) = tpu.free_ports(1)
        self.address, self.code = f"127.0.0.1:{self.port}", None
        self._server = socket.create_server(("", tpu_slice.line_port(self.port)))
        arguments = {"facts": facts, "asked": reason, "patience": patience}
        self._thread = threading.Thread(target=self._run, kwargs=arguments)
        self._thread.start()

    def _run(self, **arguments):
        with self._server:
            try:
                self.code = tpu_slice.attend(self._server, **arguments)
            except HostLostError as error:
                self.code = error

    def join(self):
        self._thread.join(30)
        return self.code


def open_lines(workers, asked=print, facts=None, timeout=10.0):
    return tpu_slice.open_slice(
        [worker.address for worker in workers],
        facts=facts or {"tensorflow": "1"},
        timeout_seconds=timeout,
        asked=asked,
    )


def test_a_run_without_a_slice_has_no_lines():
    with open_lines([]) as lines:
        assert lines.lost() is None


@pytest.mark.parametrize("error, code", [(None, 0), (ConfigError("x"), 2), (OSError("x"), 1)])
def test_workers_leave_as_the_program_does(error, code):
    workers = [FakeWorker(facts={"tensorflow": "1"}) for _ in range(2)]
    try:
        with open_lines(workers):
            if error:
                raise error
    except (ConfigError, OSError) as raised:
        assert raised is error
    assert [worker.join() for worker in workers] == [code, code]


def test_a_worker_that_is_asked_to_stop_tells_the_program():
    heard = threading.Event()
    reasons = []

    def asked(reason):
        reasons.append(reason)
        heard.set()

    facts, stop = {"tensorflow": "1"}, threading.Event()
    told = FakeWorker(facts=facts, reason=lambda: "SIGTERM" if stop.is_set() else None)
    workers = [FakeWorker(facts=facts), told]
    with open_lines(workers, asked) as lines:
        stop.set()
        assert heard.wait(10)
        lines.stopped = True
    assert reasons[0] == f"SIGTERM on TPU host 1 ({workers[1].address})"
    assert [worker.join() for worker in workers] == [42, 42]


def test_a_worker_that_is_asked_to_stop_before_the_program_comes():
    worker = FakeWorker(facts={}, reason=lambda: "SIGTERM")
    assert worker.join() == 42


@pytest.mark.parametrize(
    "facts, said",
    [
        ([{"tensorflow": "1"}, {"tensorflow": "2"}], "tensorflow is 1 on host 0 but 2"),
        ([{"tensorflow": "1"}, {}], "tensorflow is 1 on host 0 but absent"),
        (
            [{"tensorflow": "1"}, {"tensorflow": "1", "libtpu": "2"}],
            "libtpu is absent on host 0 but 2",
        ),
    ],
)
def test_other_versions_on_a_host_are_named(facts, said):
    workers = [FakeWorker(facts=each) for each in facts]
    with pytest.raises(ConfigError) as raised:
        open_lines(workers)
    assert str(raised.value).startswith(
        f"the hosts differ: {said} on TPU host 1 ({workers[1].address})"
    )
    for worker in workers:
        assert isinstance(worker.join(), HostLostError)


def test_absent_workers_are_named():
    there = FakeWorker(facts={"tensorflow": "1"})
    (port,) = tpu.free_ports(1)
    absent = f"127.0.0.1:{port}"
    began = time.monotonic()
    with pytest.raises(
        HostLostError, match=rf"waited 1 s in vain for the worker of TPU host 1 \({absent}\)"
    ):
        tpu_slice.open_slice([there.address, absent], facts={}, timeout_seconds=1.0, asked=print)
    assert time.monotonic() - began < 20
    assert isinstance(there.join(), HostLostError)


def test_a_worker_whose_program_never_comes_gives_up():
    worker = FakeWorker(facts={}, patience=0.0)
    assert "no program has called within 0 s" in str(worker.join())


def test_who_calls_and_is_no_program_is_passed_over():
    worker = FakeWorker(facts={"tensorflow": "1"})
    address = ("127.0.0.1", tpu_slice.line_port(worker.port))
    socket.create_connection(address).close()
    stranger = Line(socket.create_connection(address))
    stranger.send({"hello": 1}, deadline=time.monotonic() + 5)
    with open_lines([worker]):
        pass
    assert worker.join() == 0
    stranger.close()


def test_a_silent_worker_is_lost(monkeypatch):
    monkeypatch.setattr(tpu_slice, "_SILENT_SECONDS", 0.0)
    monkeypatch.setattr(tpu_slice, "_BEAT_SECONDS", 5.0)
    left = threading.Event()
    monkeypatch.setattr(tpu_slice, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(tpu_slice, "leave", lambda text: left.set())
    worker = FakeWorker(facts={"tensorflow": "1"})
    with open_lines([worker]) as lines:
        assert f"TPU host 0 ({worker.address}): silent for" in lines.lost()
        # Where TensorFlow hangs and raises nothing, the program is ended.
        assert left.wait(10)
    worker.join()


@pytest.mark.parametrize(
    "name, tpu_name, found",
    [
        ("auto", "", ()),
        ("single", "grpc://a:8470,grpc://b:8470", ()),
        ("tpu", "grpc://a:8470,grpc://b:8470", ("a:8470", "b:8470")),
        ("auto", "grpc://a:8470, grpc://b:8470", ("a:8470", "b:8470")),
        ("tpu", "grpc://a:8470", ()),
        ("tpu", "mine", ()),
    ],
)
def test_addresses_of_a_slice(name, tpu_name, found):
    assert find_slice(name, tpu_name) == found


@pytest.mark.parametrize("tpu_name", ["grpc://a,grpc://b", "grpc://a:1,grpc://a:1"])
def test_addresses_that_cannot_be(tpu_name):
    with pytest.raises(ConfigError, match="names the hosts of a TPU slice: "):
        find_slice("tpu", tpu_name)


def test_a_container_of_gke_is_told_by_variables(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a.b,c.b")
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert find_slice("auto") == find_slice("tpu", "local") == ("a.b:8470", "c.b:8470")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    with pytest.raises(ConfigError, match="this is host 1 of a TPU slice of 2 hosts, and the prog"):
        find_slice("auto")
    assert find_slice("local") == ()
