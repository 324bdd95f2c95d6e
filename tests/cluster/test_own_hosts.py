"""Which hosts of a list are this machine."""

import socket

import pytest

from vit_dist.cluster.own_hosts import free_addresses, own_indices, parse_hosts
from vit_dist.config.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("a,b.c-d:5000", ["a:2222", "b.c-d:5000"]),
        (f"a.b.,{'b' * 63}", ["a.b.:2222", f"{'b' * 63}:2222"]),
        (" a:1 , 10.0.0.2", ["a:1", "10.0.0.2:2222"]),
        (
            "fd00::1,[fd00::2]:5000,[fd00::3]",
            ["[fd00::1]:2222", "[fd00::2]:5000", "[fd00::3]:2222"],
        ),
    ],
)
def test_hosts_get_a_port(text, addresses):
    assert parse_hosts(text) == addresses


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no address"),
        ("a,,b", "'' is no address"),
        ("a:70000", "'a:70000' is no address"),
        ("a b", "'a b:2222' is no address"),
        ("http://a", "is no address"),
        ("a..b", "'a..b:2222' is no address"),
        (".a:1", "'.a:1' is no address"),
        (f"a,{'b' * 64}.c", "1 to 63 characters"),
        ("a,b,a:2222", "several hosts have the address a:2222"),
    ],
)
def test_no_list_of_hosts(text, message):
    with pytest.raises(ConfigError, match="--hosts") as error:
        parse_hosts(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        (f"{socket.gethostname().upper()}:1", True),
        ("192.0.2.1:1", False),  # an address of documentation, which nobody has
        ("no.such.host.invalid:1", False),
        ("[2001:db8::1]:1", False),  # the same for IPv6
    ],
)
def test_own_hosts(address, own):
    others = ["192.0.2.7:1", "192.0.2.8:1"]
    assert own_indices([others[0], address, others[1]]) == ([1] if own else [])


def test_an_address_of_a_network_card_is_own():
    """The one from which this machine calls others; where there is no network, its loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            probe.connect(("127.0.0.1", 9))
        address = probe.getsockname()[0]
    assert own_indices([f"{address}:2222"]) == [0]


def test_free_addresses_are_free_and_differ():
    addresses = free_addresses(5)
    assert len(set(addresses)) == 5
    for address in addresses:
        host, _, port = address.rpartition(":")
        socket.create_server((host, int(port))).close()
