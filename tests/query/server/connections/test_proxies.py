"""Clients of requests: addresses, trusted proxies, and limits for each client."""

import contextlib
import json
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from actstore.cli.main import run
from actstore.errors import JobError
from actstore.query.server.connections.addresses import UNIX, Proxies, address_text, counted_as
from actstore.query.server.connections.room import ConnectionLimits, Room
from tests.query.running import running
from tests.query.server.test_limits import connected, get, until

LISTED = "127.0.0.1, 10.0.0.0/8, 2001:db8::5"


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        ("127.0.0.1", "127.0.0.1", ["10.9.8.7"], "10.9.8.7"),
        # What the client writes itself comes before what the proxies know.
        ("127.0.0.1", "127.0.0.1", ["1.2.3.4, 10.9.8.7"], "10.9.8.7"),
        ("127.0.0.1", "127.0.0.1", ["1.2.3.4", "10.9.8.7"], "10.9.8.7"),
        (LISTED, "127.0.0.1", ["1.2.3.4, 192.0.2.1, 10.9.8.7, 2001:db8:0::5"], "192.0.2.1"),
        (LISTED, "127.0.0.1", ["10.0.0.1, 10.0.0.2"], "10.0.0.1"),
        (LISTED, "127.0.0.1", ["192.0.2.1, ::ffff:10.9.8.7"], "192.0.2.1"),
        (LISTED, "::ffff:127.0.0.1", ["::ffff:192.0.2.1"], "192.0.2.1"),
        ("::ffff:10.0.0.0/104", "10.3.4.5", ["192.0.2.1"], "192.0.2.1"),
        # Some proxies add the port.
        (LISTED, "127.0.0.1", ["192.0.2.1:1234, [2001:db8::5]:80"], "192.0.2.1"),
        # The last known address counts where the client is unknown.
        (LISTED, "127.0.0.1", ["1.2.3.4, unknown"], "127.0.0.1"),
        (LISTED, "127.0.0.1", ["1.2.3.4, x" + "y" * 1000 + ", 10.1.1.1"], "10.1.1.1"),
        (LISTED, "127.0.0.1", [""], "127.0.0.1"),
        (LISTED, "127.0.0.1", [], "127.0.0.1"),
        ("*", "192.0.2.9", ["1.2.3.4, 10.9.8.7"], "10.9.8.7"),
        ("*", UNIX, ["1.2.3.4, 10.9.8.7"], "10.9.8.7"),
        ("*", UNIX, [], UNIX),
    ],
)
def test_the_client_behind_proxies(trusted: str, peer: str, forwarded: Sequence[str], client: str) -> None:
    proxies = Proxies(trusted)
    assert proxies.trusts(peer)
    assert proxies.client(peer, forwarded) == client


@pytest.mark.parametrize("trusted", [None, "127.0.0.1", "10.0.0.0/8", "::1"])
def test_those_who_are_not_believed(trusted: str | None) -> None:
    assert not any(map(Proxies(trusted).trusts, ["192.0.2.1", "127.0.0.2", "::2", UNIX, "", "x"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("proxy.lan", "has 'proxy.lan', which is no address or network; give addresses"),
        ("10.0.0.1,", "has '', which is no address"),
        ("10.0.0.1,*", r"has '\*', which is no address .* or \* alone"),
        ("10.0.0.1/8", "has '10.0.0.1/8', which has bits beyond its network"),
        ("10.0.0.256", "which is no address"),
        ("127.0.0.1:80", "which is no address"),
    ],
)
def test_lists_of_proxies_that_are_none(
    text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=message):
        Proxies(text)
    assert run(["serve", "--root", str(tmp_path), "--port", "0", "--forwarded-allow-ips", text]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("::1", "::1"),
        (UNIX, UNIX),
    ],
)
def test_whose_limits_an_address_has(address: str, counted: str) -> None:
    assert counted_as(address) == counted


def test_addresses_as_logs_have_them() -> None:
    assert [address_text(address) for address in ("::ffff:10.0.0.1", "2001:DB8::0:1", UNIX)] == [
        "10.0.0.1",
        "2001:db8::1",
        UNIX,
    ]


class Guest:
    def __init__(self, address: str, *, is_of_many: bool = False) -> None:
        self.address = address
        self.is_of_many = is_of_many
        self.is_spare = self.is_dropped = False

    def drop(self) -> None:
        self.is_dropped = True

    def describe(self) -> str:
        return self.address


def n_let_in(room: Room, guests: Sequence[Guest]) -> int:
    """Count how many guests are admitted, not as spare ones, when all have a request under way."""
    for guest in guests:
        if room.admit(guest):
            room.busy(guest)
    return sum(not guest.is_spare for guest in guests if guest in room.at_work)


def test_many_clients_of_one_address_may_have_all_connections() -> None:
    limits = ConnectionLimits(8, 4)
    assert n_let_in(Room(limits), [Guest("a") for _ in range(9)]) == 4
    room = Room(limits)
    assert n_let_in(room, [Guest("a", is_of_many=True) for _ in range(9)]) == 8


@pytest.mark.parametrize(("source", "n_expected"), [("127.0.0.1", 4), ("127.0.0.2", 8), (None, 8)])
def test_a_proxy_and_a_unix_socket_have_all_connections(
    stores: Path, tmp_path: Path, source: str | None, n_expected: int
) -> None:
    """All have a request under way at once; a single client may have half of the connections."""
    # The server sends 100 Continue to admitted requests, and then waits for the body.
    begun = (
        b"POST /v1/stores/whole.bf16/select HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n"
    )
    path = tmp_path / "socket"
    arguments = ["--root", str(stores), "--uds", str(path), "--connections", "8"]
    with (
        running(tmp_path, *arguments, "--forwarded-allow-ips", "127.0.0.2") as server,
        contextlib.ExitStack() as stack,
    ):
        replies = []
        for _ in range(n_expected + 1):
            if source is None:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.settimeout(60)
                client.connect(str(path))
            else:
                client = stack.enter_context(connected(server, source=source))
            client.sendall(begun)
            replies.append(client.recv(1 << 16).split(b" ", 2)[1])
    assert replies == [b"100"] * n_expected + [b"503"]


def test_what_is_counted_and_logged_for_an_ipv4_client_of_an_ipv6_socket(
    stores: Path, tmp_path: Path
) -> None:
    log, tokens = tmp_path / "access.jsonl", tmp_path / "tokens"
    tokens.write_text("t0ken-of-somebody-1234\n")
    arguments = ["--root", str(stores), "--host", "::", "--token-file", str(tokens)]
    with running(
        tmp_path, *arguments, "--access-log", str(log), "--forwarded-allow-ips", "127.0.0.2"
    ) as server:
        server.url = server.url.replace("[::]", "127.0.0.1")
        assert get(server, "/docs")[0] == 200
        spoken = {"X-Forwarded-For": "1.2.3.4, 2001:db8::1"}
        assert get(server, "/docs", source="127.0.0.2", headers=spoken)[0] == 200
        assert get(server, "/docs", source="127.0.0.3", headers=spoken)[0] == 200
        until(lambda: log.read_text().count("\n") == 3)
    clients = [json.loads(line)["client"] for line in log.read_text().splitlines()]
    assert clients == ["127.0.0.1", "2001:db8::1", "127.0.0.3"]
