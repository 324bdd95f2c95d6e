"""Batches from other processes: byte for byte those of this one, and clear errors where not."""

import contextlib
import os
import re
import socket

import numpy as np
import pytest
import tensorflow as tf

from tests.support import images, processes, tiny
from tests.support.waiting import wait_for
from vit_dist.cluster.strategy import make_strategy
from vit_dist.data import pipeline, service
from vit_dist.data.mixing import make_mixing
from vit_dist.data.ops import basic as ops
from vit_dist.data.resized import convert_resized
from vit_dist.data.sources.open import open_source
from vit_dist.data.sources.preparation import make_preparation
from vit_dist.run.check import check
from vit_dist.run.explain import Reading, explain_reading
from vit_dist.run.input import train_data
from vit_dist.train import train

PIPE = (
    "decode_jpeg_and_inception_crop(8)|flip_lr|value_range(-1, 1)"
    "|keep('image', 'label', 'index', 'epoch')"
)
FOR_ARRAYS = PIPE.replace("decode_jpeg_and_inception_crop(8)|", "")
BATCH, COUNT = 12, 30


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Service:
    """`python -m vit_dist.data_service` in a process of its own."""

    def __init__(self, log):
        self.log, self.address = log, f"localhost:{free_port()}"
        self.start()

    def start(self):
        port = f"--port={self.address.rpartition(':')[2]}"
        command = ("vit_dist.data_service", port, "--host=localhost")
        arguments = (processes.main, command, str(self.log))
        self.log.unlink(missing_ok=True)
        self.process = processes._CONTEXT.Process(target=processes._call, args=arguments)
        self.process.start()
        wait_for(
            lambda: self.log.exists() and "ready" in self.log.read_text(),
            alive=self.process.is_alive,
        )

    def kill(self):
        self.process.kill()
        self.process.join()


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    root = tmp_path_factory.mktemp("services")
    with contextlib.ExitStack() as stack:
        started = [Service(root / f"log{i}") for i in range(2)]
        for one in started:
            stack.callback(one.kill)
        yield started


@pytest.fixture
def one(tmp_path):
    """A service for the test alone, which kills it."""
    started = Service(tmp_path / "log")
    yield started
    started.kill()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    images.write_folder(root / "folder", count=COUNT)
    images.write_tfrecords(root / "records", (11, 19), num_classes=2)
    part = {"source": "folder", "data_dir": str(root / "folder")}
    records = {"files": f"{root}/records/train-*", "num_classes": 2}
    options = {
        "folder": {"data_dir": str(root / "folder")},
        "tfrecord": records,
        "stream": {**records, "stream": True},
        "mixture": {"parts": [{**part, "weight": 1}, {**part, "weight": 2}]},
        "synthetic": {"num_examples": COUNT, "height": 20, "width": 20},
        "demo": {},
    }
    names = {"stream": "tfrecord"}
    opened = {k: open_source(names.get(k, k), split="train", **v) for k, v in options.items()}
    how = make_preparation(9, format="raw")
    convert_resized(opened["folder"], root / "raw", how, split="train", examples_per_shard=16)
    return {**opened, "raw": open_source("raw", split="train", data_dir=str(root / "raw"))}


def maker(source, *, first_step=0, local=range(1), replicas=1, pipe=PIPE, **options):
    """What `from_services` asks for: part -> dataset."""

    def make(part=(0, 1)):
        return pipeline.make_train_data(
            source,
            ops.parse(pipe),
            batch_size=BATCH,
            seed=11,
            first_step=first_step,
            num_replicas=replicas,
            local_replicas=local,
            mixing=make_mixing(mixup_alpha=1.0, mode="elem"),
            part=part,
            **options,
        )

    return make


def served(make, services, *, timeout=200, prefetch=2):
    addresses = [one.address for one in services]
    return service.from_services(make, addresses, timeout=timeout, prefetch=prefetch)


def assert_same(have, want, count):
    have, want = (list(ds.take(count).as_numpy_iterator()) for ds in (have, want))
    assert len(have) == len(want) == count
    for a, b in zip(have, want, strict=True):
        assert a.keys() == b.keys() and "mix" in a
        for key in b:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def exhaustive(*case):
    return pytest.param(*case, marks=pytest.mark.exhaustive)


KINDS = ("folder", "tfrecord", "stream", "mixture", "synthetic", "demo", "raw")
SECOND = (7, range(1, 3))  # the second of two hosts, resuming
CHOSEN = [(kind, 2 if kind in ("folder", "stream") else 1, *SECOND) for kind in KINDS]
FURTHER = [(kind, 2, *SECOND) for kind in KINDS]
FURTHER += [("folder", count, 0, range(3)) for count in (1, 2)]


@pytest.mark.parametrize(
    ("kind", "count", "step", "local"),
    [*CHOSEN, *(exhaustive(*case) for case in FURTHER if case not in CHOSEN)],
)
def test_services_make_what_this_host_would(sources, services, kind, count, step, local):
    pipe = FOR_ARRAYS if kind == "demo" else PIPE
    repeats = 1 if kind == "stream" else 3
    make = maker(
        sources[kind], first_step=step, local=local, replicas=3, pipe=pipe, repeats=repeats
    )
    have, want = served(make, services[:count]), make()
    assert have.element_spec == want.element_spec
    assert_same(have, want, 7)
    if kind == "demo":
        # Each iteration has jobs of its own: whoever joined an old one would go on where that is.
        assert_same(have, want, 5)


@pytest.mark.compiles
def test_ops_that_xla_compiles_travel(sources, services):
    make = maker(sources["folder"], pipe="decode|resize(8)|solarize(p=0.5)|value_range")
    assert_same(served(make, services[:1]), make(), 4)


@pytest.mark.parametrize("kind", [exhaustive("folder"), "stream"])
def test_a_service_that_comes_back_goes_on(sources, services, one, kind, caplog):
    make = maker(sources[kind], first_step=2)
    have = iter(served(make, [services[0], one]))
    want = list(make().take(40).as_numpy_iterator())
    for i, batch in enumerate(want):
        if i == 6:
            one.kill()
            one.start()
        np.testing.assert_array_equal(next(have)["image"], batch["image"], err_msg=f"element {i}")
    assert any(f"data service {one.address}" in line for line in caplog.messages)


def failure_of(iterator):
    with pytest.raises(tf.errors.OpError) as error:
        for _ in range(100):
            next(iterator)
    return service.find_failure(error.value)


def test_a_service_that_is_lost_ends_the_run(sources, services, one, monkeypatch):
    clients, begin = [], service._Client.__init__

    def noted(self, *args, **options):
        clients.append(self)
        begin(self, *args, **options)

    monkeypatch.setattr(service._Client, "__init__", noted)
    make = maker(sources["demo"], pipe=FOR_ARRAYS)
    have = iter(served(make, [services[0], one], timeout=15))
    for _ in range(4):  # more than what is made ahead
        next(have)
    # To begin takes a service some time; that it is gone may show sooner.
    (client,) = (client for client in clients if client._address == one.address)
    client._timeout = 3
    one.kill()
    failure = failure_of(have)
    assert isinstance(failure, ConnectionError)
    assert f"data service {one.address} cannot be reached for 3 s" in str(failure)


def test_a_service_that_never_was(sources):
    class Nobody:
        address = f"localhost:{free_port()}"

    failure = failure_of(iter(served(maker(sources["folder"]), [Nobody], timeout=2)))
    assert isinstance(failure, ConnectionError) and "cannot be reached for 2 s" in str(failure)


def test_something_else_that_listens(sources):
    with socket.create_server(("localhost", 0)) as server:

        class Other:
            address = f"localhost:{server.getsockname()[1]}"

        failure = failure_of(iter(served(maker(sources["folder"]), [Other], timeout=3)))
    assert isinstance(failure, ConnectionError) and "sent nothing for 3 s" in str(failure)


def test_an_element_out_of_turn_is_an_error(sources, services, monkeypatch):
    """As if a service had begun from the start again."""
    read = service._Client._read

    def from_the_start(self, results, ended, number):
        ask, self._ask = self._ask, lambda address, begin: ask(address, 0).skip(1)
        read(self, results, ended, number)

    monkeypatch.setattr(service._Client, "_read", from_the_start)
    monkeypatch.setattr(service, "RETRIES", 1)
    make = maker(sources["demo"], pipe=FOR_ARRAYS)
    failure = failure_of(iter(served(make, services[:1])))
    assert isinstance(failure, ValueError)
    assert re.search(r"failed: element \d+ came instead of 0$", str(failure))


# a config


def config_of(folder, services, **changed):
    addresses = ",".join(one.address for one in services)
    return tiny.of_folder(folder, data__val_split="", input__service=addresses, **changed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    "devices",
    # test_services_make_what_this_host_would has the shares of replicas.
    [{}, exhaustive({"strategy__name": "mirrored", "strategy__virtual_cpus": 2})],
    ids=str,
)
def test_a_run_and_its_resume(tmp_path, folder, services, devices):
    train(config_of(folder, services, **devices), str(tmp_path / "parts"))
    # Another number of services goes on.
    parts = config_of(folder, services[1:], total_steps=4, **devices)
    train(parts, str(tmp_path / "parts"))
    whole = tiny.of_folder(folder, data__val_split="", total_steps=4, **devices)
    train(whole, str(tmp_path / "whole"))
    tiny.assert_same(tiny.arrays(tmp_path / "parts"), tiny.arrays(tmp_path / "whole"), atol=0)


def test_two_workers(tmp_path, folder, services):
    """Each has jobs of its own."""
    flags = [f"--config={processes.TINY}", "--config.data.source=folder"]
    flags += [f"--config.data.data_dir={folder}", "--config.data.val_split="]
    flags += ["--config.total_steps=3", "--config.model.dropout=0.0"]
    flags += [f"--config.input.train_ops=decode|{tiny.ANY_SIZE}", "--config.optimizer.name=sgd"]
    code, text = processes.run(*flags, f"--workdir={tmp_path / 'one'}", log=tmp_path / "log")
    assert code == 0, text[-1500:]
    flags += [f"--config.input.service={services[0].address}"]
    flags += [f"--workdir={tmp_path / 'two'}", "--config.strategy.name=multiworker"]
    with processes.hosts(*flags, log=tmp_path / "log") as workers:
        assert [w.wait() for w in workers] == [0, 0], [w.text()[-1500:] for w in workers]
    tiny.assert_same(tiny.arrays(tmp_path / "two"), tiny.arrays(tmp_path / "one"), atol=1e-6)


def failure_of_run(config, strategy):
    options, data = check(config)
    with pytest.raises(tf.errors.OpError) as error:
        next(iter(train_data(options, data, strategy, first_step=0)))
    return explain_reading(error.value, Reading("train", options.input.pipe), data)


def test_a_bad_file_is_named_as_without_a_service(tmp_path, services, monkeypatch):
    monkeypatch.setattr(service, "RETRIES", 0)
    folder = tiny.make_folder(tmp_path / "images")
    bad = folder / "train" / "dogs" / "5.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    failure = failure_of_run(config_of(folder, services[:1]), make_strategy(name="single"))
    assert isinstance(failure, ValueError) and f"image file {str(bad)!r}" in str(failure)


def test_files_that_the_service_does_not_see(tmp_path, services, monkeypatch):
    """A relative path is another one in another working directory."""
    tiny.make_folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(service, "RETRIES", 0)
    config = config_of("images", services[:1])
    failure = failure_of_run(config, make_strategy(name="single"))
    assert isinstance(failure, ValueError)
    assert f"data service {services[0].address} failed: " in str(failure)
    assert "images/train" in str(failure) and "No such file" in str(failure)
    assert "under the same paths" in str(failure)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"input__service": "nowhere"}, "'nowhere' is no address: give host:port"),
        ({"input__service": "grpc://a:1"}, "'grpc://a:1' is no address"),
        ({"input__service": "a:1,a:1"}, "a:1 is given twice"),
        ({"input__service": "a:70000"}, "'a:70000' is no address"),
        ({"input__service": "a:1", "input__on_bad_example": "mask"}, "set it to 'fail'"),
        ({"input__service": "a:1", "input__service_timeout": 0.0}, "_timeout must be above 0"),
        ({"input__service": "a:1", "input__cache": "raw"}, "calls Python.*cache='off'"),
    ],
)
def test_mistakes_die_before_a_device_starts(folder, changed, words):
    with pytest.raises(ValueError, match=rf"config\.input\.service.*{words}"):
        check(tiny.of_folder(folder, **changed))


def test_array_records_are_refused(tmp_path, sources):
    from vit_dist.data.sources.array_record import convert

    convert(sources["folder"], tmp_path, split="train", examples_per_shard=8)
    data = {"data__source": "array_record", "data__data_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"cannot read array_record.*It takes demo, folder, raw"):
        check(tiny.without_evaluation(**data, input__service="a:1"))


def test_a_port_in_use(services, tmp_path):
    port = services[0].address.rpartition(":")[2]
    command = ("vit_dist.data_service", f"--port={port}", "--host=localhost")
    code, text = processes.call(processes.main, *command, log=tmp_path / "log")
    assert code == 1 and "error: Address already in use" in text


@pytest.mark.parametrize("host", ["no.such.host.invalid", "no..host"])
def test_a_host_that_has_no_address(host, tmp_path):
    command = ("vit_dist.data_service", f"--host={host}")
    code, text = processes.call(processes.main, *command, log=tmp_path / "log")
    assert code == 2 and f"{host!r} is no known name" in text


def test_sigterm_ends_a_service(one):
    os.kill(one.process.pid, 15)
    one.process.join(20)
    assert one.process.exitcode == 0
