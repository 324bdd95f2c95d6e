"""How hosts meet, what they compare, and how they leave together."""

import socket
import threading
import time

import pytest
from absl import logging

from tests.support.clusters import free_addresses, in_threads
from vit_dist.cluster.environment import Cluster
from vit_dist.cluster.meeting import meet
from vit_dist.config.errors import ConfigError, HostLostError


def cluster_of(workers, index):
    return Cluster(tuple(workers), index, "TF_CONFIG")


def meet_and_leave(workers, index, timeout):
    with meet(cluster_of(workers, index), timeout_seconds=timeout):
        pass


def meet_in_threads(workers, indices, timeout):
    """worker -> None, or what it complained of."""
    return in_threads(lambda i: meet_and_leave(workers, i, timeout), indices)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_workers_meet_in_any_order_and_leave_the_port_free(order):
    workers = free_addresses(3)
    assert meet_in_threads(workers, order, timeout=60) == {0: None, 1: None, 2: None}
    socket.create_server(("", int(workers[0].rpartition(":")[2]))).close()


def test_who_told_is_printed(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "info", lambda text, *args: said.append(text % args))
    workers = free_addresses(2)
    meet_in_threads(workers, (0, 1), timeout=60)
    for i, worker in enumerate(workers):
        assert f"TF_CONFIG says that this is worker {i} ({worker}), of 2 hosts" in said


def test_the_port_is_free_for_tensorflow_while_the_lines_last():
    workers = free_addresses(2)

    def one(index):
        with meet(cluster_of(workers, index), timeout_seconds=60) as meeting:
            socket.create_server(("", int(workers[index].rpartition(":")[2]))).close()
            meeting.agree({})

    assert in_threads(one, (0, 1)) == {0: None, 1: None}


def test_ipv6():
    # Free for IPv4, too: a host listens at all its addresses.
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as free:
        port = free.getsockname()[1]
    workers = [f"[::1]:{port}", free_addresses(1)[0]]
    assert meet_in_threads(workers, (0, 1), timeout=60) == {0: None, 1: None}


@pytest.fixture
def late(monkeypatch):
    """Host name -> how often it does not resolve, before it leads to this machine."""
    failures, resolve = {}, socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        if host not in failures:
            return resolve(host, *args, **kwargs)
        failures[host] -= 1
        if failures[host] >= 0:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve("localhost", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return failures


@pytest.mark.parametrize("index", [0, 1])
def test_names_that_do_not_resolve_yet(late, index):
    """A headless service knows a pod only once it runs."""
    late["vit-0-1.vit"] = 4
    workers = free_addresses(2)
    workers[index] = workers[index].replace("localhost", "vit-0-1.vit")
    assert meet_in_threads(workers, (0, 1), timeout=60) == {0: None, 1: None}
    assert late["vit-0-1.vit"] < 0


def test_a_name_that_never_resolves_is_named(late):
    late["nowhere"] = 10**9
    workers = [*free_addresses(1), free_addresses(1)[0].replace("localhost", "nowhere")]
    outcome = meet_in_threads(workers, (0, 1), timeout=1)
    assert all(isinstance(error, HostLostError) for error in outcome.values())
    message = f"cannot find worker 1 ({workers[1]}), which has called: its name does not resolve"
    assert any(message in str(error) for error in outcome.values())


def test_absent_workers_are_named():
    workers = free_addresses(3)
    outcome = meet_in_threads(workers, (0, 2), timeout=1)
    assert all(isinstance(error, HostLostError) for error in outcome.values())
    assert f"worker 0 waited 1 s in vain for worker 1 ({workers[1]}): start" in str(outcome[0])
    assert f"worker 2 waited 1 s in vain for worker 0 ({workers[0]})" in str(outcome[2])


def call(address, line):
    """Connects as soon as somebody listens, and says one thing."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(line)
            return
        except OSError:
            assert time.monotonic() < deadline


def test_strangers_do_not_count():
    """A port scanner, or a worker with another list of workers, which is named."""
    workers = free_addresses(2)
    outcome = {}
    waiting = threading.Thread(
        target=lambda: outcome.update(meet_in_threads(workers, (0,), timeout=3))
    )
    waiting.start()
    for line in (b"GET / HTTP/1.1\r\n\r\n", b"", b"[1]\n", b'{"vit_dist": ["x:1"], "index": 1}\n'):
        call(workers[0], line)
    waiting.join()
    message = str(outcome[0])
    assert "in vain for worker 1" in message
    assert "(called by others: worker 1 of ['x:1'])" in message


def test_a_port_that_another_process_keeps(monkeypatch):
    monkeypatch.setattr("vit_dist.cluster.meeting._PORT_SECONDS", 0.3)
    workers = free_addresses(2)
    port = workers[1].rpartition(":")[2]
    with socket.create_server(("", int(port))):
        outcome = meet_in_threads(workers, (1,), timeout=60)
    assert f"worker 1 cannot listen at port {port} (Address already in use)" in str(outcome[1])


@pytest.mark.parametrize("cluster", [None, cluster_of(["localhost:1"], 0)])
def test_one_worker_waits_for_nobody(cluster):
    with meet(cluster, timeout_seconds=0.1) as meeting:
        meeting.agree({"config": {"seed": 0}})


# agreement


def agree_in_threads(facts, timeout=60):
    """worker -> None, or what it complained of; worker i has facts[i], or raises them."""
    workers = free_addresses(len(facts))

    def one(index):
        with meet(cluster_of(workers, index), timeout_seconds=timeout) as meeting:
            if isinstance(facts[index], BaseException):
                raise facts[index]
            meeting.agree(facts[index])

    return workers, in_threads(one, range(len(facts)))


SAME = {"config": {"seed": 0, "model": {"width": 16}}, "data": {"train": {"num_examples": 5}}}


def test_equal_facts():
    _, outcome = agree_in_threads([SAME, SAME, dict(reversed(SAME.items()))])
    assert outcome == {0: None, 1: None, 2: None}


def changed(**sections):
    return {**SAME, **sections}


@pytest.mark.parametrize(
    "facts, said",
    [
        (
            [SAME, changed(config={"seed": 1, "model": {"width": 16}})],
            "config.seed is 0 on {0} but 1 on {1}. Make them alike (start all with the same config "
            "file and flags) and start all again",
        ),
        (
            [SAME, SAME, changed(data={"train": {"num_examples": 4}})],
            "data.train.num_examples is 5 on {0} but 4 on {2}. Make them alike (all must read",
        ),
        ([SAME, changed(code={"tensorflow": "2"})], 'code.tensorflow is absent on {0} but "2" on'),
        (
            [SAME, changed(config={"seed": 1}), changed(config={"seed": 1})],
            "config.model.width is 16 on {0} but absent on {1}, {2}; config.seed is 0 on {0} but 1 "
            "on {1}, {2}. ",
        ),
        (
            [changed(data={str(i): i for i in range(5)}), changed(data={})],
            "data.0 is 0 on {0} but absent on {1}; data.1 is 1 on",
        ),
    ],
)
def test_unlike_facts_are_named_on_all_hosts(facts, said):
    workers, outcome = agree_in_threads(facts)
    names = [f"worker {i} ({worker})" for i, worker in enumerate(workers)]
    messages = {str(error) for error in outcome.values()}
    assert all(isinstance(error, ConfigError) for error in outcome.values())
    (message,) = messages
    assert message.startswith("the hosts differ: ") and said.format(*names) in message


def test_an_answer_that_holds_no_facts():
    """Taken for facts that are all absent, it would be told as a difference of the hosts."""
    workers = free_addresses(2)

    def one(index):
        with meet(cluster_of(workers, index), timeout_seconds=60) as meeting:
            if index == 0:
                meeting.agree(SAME)
            line = meeting.lines[0]
            for message in ({"digest": "another"}, {"something": "else"}):
                line.send(message, deadline=time.monotonic() + 60)
            while "left" not in line.receive(deadline=time.monotonic() + 60):
                pass

    error = in_threads(one, range(2))[0]
    assert isinstance(error, HostLostError)
    assert f"worker 1 ({workers[1]}) answered {{'something': 'else'}}, which are no" in str(error)


def test_many_differences_are_counted():
    many = changed(data={str(i): i for i in range(5)})
    _, outcome = agree_in_threads([SAME, many])
    assert "; and 3 more. Make" in str(outcome[0])


@pytest.mark.parametrize("leaving", [0, 1])
@pytest.mark.parametrize(
    "error, kind, said",
    [
        (ConfigError("no such file"), ConfigError, " ended: no such file"),
        (ValueError("a fault of ours"), HostLostError, " ended: a fault of ours"),
        (OSError("no space"), HostLostError, " ended: no space"),
        (KeyboardInterrupt(), HostLostError, " ended: KeyboardInterrupt"),
        (SystemExit(42), SystemExit, "42"),
    ],
)
def test_all_end_as_the_first_does(leaving, error, kind, said):
    facts = [SAME, SAME, SAME]
    facts[leaving] = error
    workers, outcome = agree_in_threads(facts)
    for i in {0, 1, 2} - {leaving}:
        assert type(outcome[i]) is kind and said in str(outcome[i])
        name = f"worker {leaving} ({workers[leaving]})"
        assert kind is SystemExit or name in str(outcome[i])


def test_a_host_that_is_gone_without_a_word():
    workers = free_addresses(2)

    def one(index):
        with meet(cluster_of(workers, index), timeout_seconds=60) as meeting:
            if index:
                meeting.lines.pop(0).close()
            else:
                meeting.agree(SAME)

    outcome = in_threads(one, (0, 1))
    assert isinstance(outcome[0], HostLostError)
    assert f"worker 1 ({workers[1]}) is gone without a word" in str(outcome[0])


def test_a_chief_that_may_be_late():
    """It answers when the other's own limit has passed, as a lock takes its time."""
    workers, waits, lost = free_addresses(2), threading.Event(), threading.Event()

    def one(index):
        with meet(cluster_of(workers, index), timeout_seconds=60) as meeting:
            if index == 0:
                assert waits.wait(60)
                assert meeting.gather("a", chief_seconds=60) == ["a", "b"]
                assert lost.wait(60)
                return
            meeting._timeout_seconds = 0.0
            waits.set()
            assert meeting.gather("b", chief_seconds=60) == ["a", "b"]
            try:
                meeting.gather("b", chief_seconds=0.5)
            finally:
                lost.set()

    outcome = in_threads(one, (0, 1))
    assert outcome[0] is None and isinstance(outcome[1], HostLostError)
    assert f"worker 0 ({workers[0]}) has said nothing for 0.5 s" in str(outcome[1])


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_of_another_version(index):
    """It asks first for something else than this one does."""
    workers = free_addresses(2)

    def one(i):
        with meet(cluster_of(workers, i), timeout_seconds=60) as meeting:
            if i == index:
                meeting.gather("a")
            else:
                meeting.agree(SAME)

    error = in_threads(one, range(2))[index]
    assert isinstance(error, HostLostError)
    assert "install the same versions on all hosts" in str(error)


def test_a_host_that_says_nothing():
    workers = free_addresses(2)
    done = threading.Event()

    def one(index):
        with meet(cluster_of(workers, index), timeout_seconds=1) as meeting:
            if index:
                done.wait(30)
                return
            try:
                meeting.agree(SAME)
            finally:
                done.set()

    outcome = in_threads(one, (0, 1))
    assert f"worker 1 ({workers[1]}) has said nothing for 1 s" in str(outcome[0])
