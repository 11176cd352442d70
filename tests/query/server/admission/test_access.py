"""Who may read what: tokens, replies to clients without one, and servers that refuse to start."""

import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

import actstore
from actstore.cli.main import run
from actstore.errors import JobError, StorageError
from actstore.facade import Store
from actstore.query.client.served_store import ServedStore
from actstore.query.loopback import is_loopback
from actstore.query.problem import Problem
from actstore.query.server.admission import access
from actstore.query.server.admission.access import Access, Scope, check_token_file
from actstore.query.server.admission.hosts import Hosts
from actstore.query.wire import JSON, PROBLEM
from tests.commands import command
from tests.query.running import Running, running
from tests.query.stores import WHOLE
from tests.store.example import HOOKS

pytestmark = pytest.mark.xdist_group("access")

_HOOK: Final = HOOKS[0]
OURS, THEIRS, ABSENT = "alpha-7f3a91c2", "betas-4d6e08b5", "gamma-5c1d77aa"
"""Names of equal length: of two stores, and of none."""
ALL, ONE, NONE = "all-3q8Zk1mXw0-f5", "one-x7Rt5pLd2Q-a0", "none-u4Ee9sYb6N-b1"
HASHED = "hashed-h2Jf8cVn5M-c2"
LATER = "later-w6Kk3gTz7P-d3"
WRONG = "wrong-m1Aa2sDd3F-e4"
TOKENS: Final = (ALL, ONE, NONE, HASHED, LATER, WRONG)
_TOKEN_FILE: Final = f"""\
# Who may read what.
{ALL}
{ONE}   alpha-*  # theirs
  {NONE} delta-*

sha256:{hashlib.sha256(HASHED.encode()).hexdigest()} betas-* other
"""


def file_of(folder: Path, text: str | bytes) -> Path:
    path = folder / "tokens.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


SCOPES: Final[dict[str, tuple[str, ...] | None]] = {
    ALL: ("*",),
    ONE: ("alpha-*",),
    NONE: ("delta-*",),
    HASHED: ("betas-*", "other"),
    WRONG: None,
    "": None,
    "#": None,
    "alpha-*": None,
    "theirs": None,
    ONE[:-1]: None,
    f"{ONE} ": None,
    ONE.upper(): None,
    f"sha256:{hashlib.sha256(HASHED.encode()).hexdigest()}": None,
    hashlib.sha256(HASHED.encode()).hexdigest(): None,
    "\xff" * 20: None,
}


def test_tokens_of_a_file(tmp_path: Path) -> None:
    tokens = Access(file_of(tmp_path, _TOKEN_FILE))
    for token, globs in SCOPES.items():
        scope = tokens.scope(token)
        assert (scope and scope.globs) == globs, token


def test_a_client_is_told_by_nothing_of_its_token(tmp_path: Path) -> None:
    tokens = Access(file_of(tmp_path, _TOKEN_FILE))
    scopes = [tokens.scope(token) for token in (ALL, ONE, NONE, HASHED)]
    clients = [scope.client for scope in scopes if scope]
    assert len(set(clients)) == 4
    assert not any(token[:4] in client for token in TOKENS for client in clients)


def test_names_of_tokens(tmp_path: Path) -> None:
    """The name may be anywhere in the line; several tokens may share one, as while one replaces another."""
    tokens = Access(
        file_of(tmp_path, f"{ALL} name=ann # x\n{ONE} name=ann alpha-*\n{NONE} delta-* name=b.o_b@x-y z\n")
    )
    assert tokens.scope(ALL) == Scope("ann", ("*",))
    assert tokens.scope(ONE) == Scope("ann", ("alpha-*",))
    assert tokens.scope(NONE) == Scope("b.o_b@x-y", ("delta-*", "z"))


@pytest.mark.parametrize(
    ("globs", "allowed", "refused"),
    [
        (("*",), ["a", "a.b"], []),
        (("a", "b"), ["a", "b"], ["c", "A", "aa", ""]),
        (("run-*",), ["run-", "run-1"], ["run", "a-run-1"]),
        (("run-[12]",), ["run-1"], ["run-3", "run-12"]),
        (("?",), ["a"], ["ab"]),
    ],
)
def test_scopes(globs: tuple[str, ...], allowed: list[str], refused: list[str]) -> None:
    scope = Scope("client", globs)
    assert all(map(scope.allows, allowed))
    assert not any(map(scope.allows, refused))


@pytest.mark.parametrize(
    ("globs", "is_all"), [(("*",), True), (("a", "*"), True), (("a*",), False), (("?",), False), ((), False)]
)
def test_who_may_read_all_stores(globs: tuple[str, ...], is_all: bool) -> None:
    """Only they may read the counters of the server, which name clients."""
    assert Scope("client", globs).is_all is is_all


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no token; write one a line"),
        ("\n  \n# only a comment\n", "has no token; write one a line"),
        ("tooshort", "line 1 .* 16 characters"),
        (f"{ALL}\n\nfifteen-letters", "line 3 .* 16 characters"),
        (f"#{ALL}\nshort *", "line 2 .* 16 characters"),
        (f"sha256:{'0' * 63}", "line 1"),
        (f"sha256:{'0' * 66}", "line 1"),
        (f"sha256:{'g' * 64}", "line 1"),
        ("sha256:", "line 1"),
        (b"\xff\xfe" * 20, "line 1 .* is not UTF-8"),
        (f"{ALL}\n{ONE} name=", "line 2 .* has the name ''; a name begins with a letter"),
        (f"{ALL} name=10.0.0.1", "line 1 .* has the name '10.0.0.1'; a name begins"),
        (f"{ALL} name=fe80::1", "line 1 .* has the name 'fe80::1'"),
        (f"{ALL} name=unix", "line 1 .* is not 'unix'"),
        (f"{ALL} name={'x' * 65}", "line 1 .* up to 64 letters"),
        (f"{ALL} name=a name=b", "line 1 .* has 2 names; give its token one name="),
        (f"{ALL} name=a name=a", "line 1 .* has 2 names"),
        ("name=ann", "line 1 .* 16 characters"),
    ],
)
def test_wrong_files(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=message) as caught:
        check_token_file(file_of(tmp_path, text))
    assert ALL not in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read: No such file"):
        check_token_file(tmp_path / "nowhere")


class Looking(Access):
    """An `Access` that looks at its file at each request."""

    @property
    def is_open(self) -> bool:
        self.look()
        return super().is_open

    def scope(self, token: str) -> Scope | None:
        self.look()
        return super().scope(token)


def test_a_file_is_read_again_and_again(tmp_path: Path) -> None:
    tokens = Access(file_of(tmp_path, _TOKEN_FILE))
    file_of(tmp_path, f"{LATER} beta\n")
    assert tokens.scope(ALL)  # the file has just been read
    tokens.start()
    try:
        _until(lambda: tokens.scope(LATER) is not None)
        assert tokens.scope(LATER) == Scope(hashlib.sha256(LATER.encode()).hexdigest()[:12], ("beta",))
        assert tokens.scope(ALL) is None
    finally:
        tokens.close()


def test_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No request waits for it, and no token is valid by contents that were read more than two seconds before."""
    goes_on, read = threading.Event(), access._read
    goes_on.set()

    def held_up(path: Path) -> bytes:
        goes_on.wait()
        return read(path)

    monkeypatch.setattr(access, "_read", held_up)
    path = file_of(tmp_path, _TOKEN_FILE)
    tokens = Access(path)
    tokens.start()
    try:
        assert tokens.scope(ALL)
        goes_on.clear()
        path.write_text(f"{LATER}\n")
        gone_at = time.monotonic()

        def ask_on() -> None:
            while time.monotonic() < gone_at + 2.0:
                tokens.scope(ALL)
            tokens.scope(ALL)

        with pytest.raises(Problem, match="token file cannot be read now") as refused:
            ask_on()
        assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "1"})
        assert not tokens.is_open
        goes_on.set()
        _until(lambda: tokens.is_open)
        assert tokens.scope(LATER)
        assert tokens.scope(ALL) is None
    finally:
        goes_on.set()
        tokens.close()
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "could not be read within 2 s; nobody is let in until it can" in caplog.text


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Replace a file by something else."""

    def act(path: Path) -> None:
        path.unlink()
        make(path)

    return act


LOST: Final[dict[str, Callable[[Path], object]]] = {
    "the line is gone": lambda path: path.write_text(f"{LATER}\n"),
    "the line is gone, and another is wrong": lambda path: path.write_text(f"short\n{LATER}\n"),
    "the line is no text": lambda path: path.write_bytes(b"\xff\xfe" * 20 + f"\n{LATER}\n".encode()),
    "the line is cut": lambda path: path.write_text(f"{LATER}\n{ALL[:-1]}"),
    "empty": lambda path: path.write_text(""),
    "only wrong lines": lambda path: path.write_text("short\n"),
    "comments": lambda path: path.write_text(f"# {ALL}\n"),
    "gone": lambda path: path.unlink(),
    "a folder": instead(Path.mkdir),
    "a pipe": instead(os.mkfifo),
    "a link to nothing": instead(lambda path: path.symlink_to("nothing")),
    "too large": lambda path: path.write_text(f"{ALL}\n" + "#" * (1 << 20)),
    "replaced": lambda path: file_of(path.parent / "new", f"{LATER}\n").replace(path),
}


@pytest.mark.parametrize("how", LOST)
def test_a_token_that_is_not_there_any_more(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "new").mkdir()
    path = file_of(tmp_path, f"{ALL}\n")
    tokens = Looking(path)
    assert tokens.scope(ALL)
    LOST[how](path)
    keeps_others = path.is_file() and LATER in path.read_bytes().decode(errors="replace")
    for _ in range(3):
        assert tokens.scope(ALL) is None
        assert bool(tokens.scope(LATER)) is keeps_others
        assert tokens.is_open is keeps_others
    is_right = how in ("the line is gone", "the line is cut", "replaced")
    assert len(caplog.records) == (not is_right)  # it is logged once
    assert ("nobody is let in" in caplog.text) is not keeps_others
    assert not any(token[:9] in caplog.text for token in TOKENS)


def test_a_file_that_is_right_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = file_of(tmp_path, f"{ALL}\n")
    tokens = Looking(path)
    path.unlink()
    assert not tokens.is_open
    file_of(tmp_path, f"{ALL}\n")
    assert tokens.scope(ALL)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "as it should be again" in caplog.text


def test_a_change_that_the_file_system_does_not_show(tmp_path: Path) -> None:
    """The inode, size and time stay the same."""
    path = file_of(tmp_path, f"{ALL}\n")
    tokens, before = Looking(path), path.stat()
    other = ALL[::-1]
    path.write_text(f"{other}\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )
    assert tokens.scope(ALL) is None
    assert tokens.scope(other)


def test_half_a_line_gives_nothing(tmp_path: Path) -> None:
    """Without its stores, a token would be valid for all stores."""
    path = file_of(tmp_path, f"{ALL}\n")
    tokens = Looking(path)
    with path.open("w") as file:
        for part in (f"{ALL}\n{LATER}", " alpha"):
            file.write(part)
            file.flush()
            assert tokens.scope(LATER) is None
        file.write("-*\n")
    scope = tokens.scope(LATER)
    assert scope
    assert scope.globs == ("alpha-*",)
    # A last line without a line break counts once it stays the same.
    file_of(tmp_path, ONE)
    assert tokens.scope(ONE) is None
    assert tokens.scope(ONE)


@dataclass(frozen=True)
class Reply:
    """A reply without its date."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name)

    @property
    def text(self) -> str:
        return f"{self.status} {self.headers} {self.body!r}"


def ask(
    url: str,
    path: str,
    token: str | None = None,
    *,
    method: str = "GET",
    body: str | None = None,
    **more: str,
) -> Reply:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    headers = {"Content-Type": JSON} if body is not None else {}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    try:
        connection.request(method, path, body, headers | more)
        reply = connection.getresponse()
        fields = tuple(sorted((name.lower(), value) for name, value in reply.getheaders() if name != "date"))
        return Reply(reply.status, fields, reply.read())
    finally:
        connection.close()


@pytest.fixture(scope="module")
def root(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two stores, whose names are nowhere else."""
    folder = tmp_path_factory.mktemp("guarded")
    for name in (OURS, THEIRS):
        shutil.copytree(stores / WHOLE, folder / name)
    return folder


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file_of(tmp_path_factory.mktemp("tokens"), _TOKEN_FILE)


@pytest.fixture(scope="module")
def guarded(root: Path, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with tokens, which logs each request; the log must have no token."""
    arguments = ("--root", str(root), "--token-file", str(token_file), "--verbose")
    with running(tmp_path_factory.mktemp("guarded-server"), *arguments) as server:
        yield server
        log = server.log.read_text()
        assert '"path": "/v1/stores"' in log
        assert not [token for token in TOKENS if token in log or token[5:] in log]


_SELECTION: Final = json.dumps({"hooks": [_HOOK]})
RESOURCES: Final[dict[str, tuple[str, str, str | None]]] = {
    "store": ("GET", "", None),
    "hooks": ("GET", "/hooks", None),
    "statistics": ("GET", f"/hooks/{_HOOK}/stats", None),
    "slice": ("GET", f"/hooks/{_HOOK}/slice", None),
    "no hook": ("GET", "/hooks/none/slice", None),
    "wrong slice": ("GET", f"/hooks/{_HOOK}/slice?seq=x", None),
    "rows that are none": ("GET", f"/hooks/{_HOOK}/slice?seq=999", None),
    "wrong format": ("GET", f"/hooks/{_HOOK}/slice?format=x", None),
    "prompts": ("GET", "/prompts?tokens=9", None),
    "order": ("GET", f"/batches?hook={_HOOK}&batch_size=8", None),
    "batch": ("GET", f"/batches/0?hook={_HOOK}&batch_size=8", None),
    "wrong batch": ("GET", "/batches/0?batch_size=0", None),
    "selection": ("POST", "/select", _SELECTION),
    "wrong selection": ("POST", "/select", "{"),
    "plan": ("POST", "/plan", json.dumps({"keys": ["zarr.json"]})),
    "zarr": ("GET", "/zarr/zarr.json", None),
    "no object": ("GET", "/zarr/none", None),
    "head": ("HEAD", "/zarr/zarr.json", None),
    "another method": ("DELETE", "", None),
    "no resource": ("GET", "/none", None),
    "slash": ("GET", "/", None),
    "dots": ("GET", f"/../{OURS}", None),
}
"""Requests for a store: method, path below it, body."""


@pytest.mark.parametrize("name", RESOURCES)
def test_a_store_out_of_scope_is_as_one_that_is_not_there(name: str, guarded: Running) -> None:
    method, path, body = RESOURCES[name]
    for token in (ONE, NONE, None, WRONG):
        replies = [
            ask(guarded.url, f"/v1/stores/{store}{path}", token, method=method, body=body)
            for store in (THEIRS, ABSENT)
        ]
        there, absent = replies
        assert there.body.replace(THEIRS.encode(), b"?") == absent.body.replace(ABSENT.encode(), b"?")
        assert (there.status, there.headers) == (absent.status, absent.headers)
        assert 400 <= there.status < 500
        assert there.header("content-type") == PROBLEM
        if token in (None, WRONG):
            assert (there.status, there.header("www-authenticate")) == (401, "Bearer")
            assert not [secret for secret in (OURS, THEIRS) if secret in there.text]
        assert OURS not in there.text.replace(path, "")
        assert not [secret for secret in TOKENS if secret in there.text]


@pytest.mark.parametrize(
    "name", ["store", "hooks", "statistics", "slice", "batch", "selection", "plan", "zarr"]
)
def test_a_store_in_scope_is_given(name: str, guarded: Running) -> None:
    method, path, body = RESOURCES[name]
    for token, store in ((ALL, OURS), (ALL, THEIRS), (ONE, OURS), (HASHED, THEIRS)):
        reply = ask(guarded.url, f"/v1/stores/{store}{path}", token, method=method, body=body)
        assert reply.status == 200, reply.text


@pytest.mark.parametrize(
    ("token", "names"), [(ALL, [OURS, THEIRS]), (ONE, [OURS]), (HASHED, [THEIRS]), (NONE, [])]
)
def test_lists_have_what_is_in_scope(token: str, names: list[str], guarded: Running) -> None:
    reply = ask(guarded.url, "/v1/stores", token)
    assert [store["name"] for store in json.loads(reply.body)["stores"]] == names


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {WRONG}",
        f"Bearer {ALL}x",
        f"Bearer {ALL} x",
        f"Bearer Bearer {ALL}",
        f"Basic {ALL}",
        f"Token {ALL}",
        ALL,
        f"Bearer sha256:{hashlib.sha256(HASHED.encode()).hexdigest()}",
        "Bearer \xff\xfe",
        "Bearer " + "x" * 20_000,
    ],
    ids=lambda value: value[:12],
)
def test_what_is_no_token(value: str, guarded: Running) -> None:
    for path in ("/v1/stores", f"/v1/stores/{OURS}", "/metrics", "/none"):
        reply = ask(guarded.url, path, Authorization=value)
        assert (reply.status, reply.header("www-authenticate")) == (401, "Bearer"), path
        assert json.loads(reply.body)["type"] == "urn:actstore:problem:token"


def test_how_a_token_may_be_sent(guarded: Running) -> None:
    for value in (f"Bearer {ONE}", f"bearer {ONE}", f"BEARER   {ONE} "):
        assert ask(guarded.url, f"/v1/stores/{OURS}", Authorization=value).status == 200
    assert ask(guarded.url, f"/v1/stores/{OURS}?token={WRONG[:5]}").status == 401


def test_counters_are_for_those_who_may_read_all(guarded: Running) -> None:
    assert ask(guarded.url, "/metrics").status == 401
    for token in (ONE, NONE, HASHED):
        refused, absent = (ask(guarded.url, path, token) for path in ("/metrics", "/nothing"))
        assert refused == absent
        assert refused.status == 404
    counters = ask(guarded.url, "/metrics", ALL)
    assert counters.status == 200
    assert b"actstore_requests_total" in counters.body
    assert not [text for text in (OURS, THEIRS, *TOKENS) if text in counters.text]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
def test_what_everybody_may_see_names_no_store(path: str, guarded: Running, root: Path) -> None:
    for token in (None, WRONG, ONE):
        reply = ask(guarded.url, path, token)
        assert reply.status == 200
        assert not [text for text in (OURS, THEIRS, str(root), *TOKENS) if text in reply.text]


def bits(store: Store) -> bytes:
    return store[_HOOK].numpy(slice(3, 9)).tobytes()


def test_the_client_sends_its_token(guarded: Running, stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bits(actstore.open(stores / WHOLE))
    url = f"{guarded.url}/v1/stores/{OURS}"
    assert bits(actstore.open(url, token=ONE, direct=False)) == expected
    assert bits(actstore.open(url, token=ALL, direct=True)) == expected
    monkeypatch.setenv("ACTSTORE_TOKEN", ONE)
    store = actstore.open(url, direct=False)
    assert isinstance(store, ServedStore)
    assert bits(store.reopened()) == expected
    assert store.zarr["acts"][_HOOK].shape == store[_HOOK].shape  # type: ignore[index, union-attr]
    with pytest.raises(StorageError, match="needs a valid token"):
        actstore.open(url, token=WRONG)


@pytest.mark.parametrize(
    (("url", "message")),
    [
        ("http://ann:secret-of-ann-1234@127.0.0.1:8000/v1/stores/a", "ACTSTORE_TOKEN"),
        ("http+unix:///run/actstore.sock/v1/stores/a", "%2F in the place of each '/'"),
        ("http+unix://run%2Factstore.sock/v1/stores/a", "%2F in the place of each '/'"),
    ],
)
def test_urls_that_no_server_has(url: str, message: str) -> None:
    """Each is refused before anything is requested, and no error shows a secret."""
    with pytest.raises(StorageError) as raised:
        actstore.open(url)
    assert message in str(raised.value)
    assert "secret" not in str(raised.value)


def test_the_client_says_what_is_wrong_with_its_token(guarded: Running) -> None:
    for token in (None, WRONG):
        with pytest.raises(StorageError, match=r"needs a valid token; .*ACTSTORE_TOKEN") as caught:
            actstore.open(f"{guarded.url}/v1/stores/{OURS}", token=token)
        assert WRONG not in str(caught.value)
    with pytest.raises(StorageError, match=f"there is no store '{THEIRS}'") as caught:
        actstore.open(f"{guarded.url}/v1/stores/{THEIRS}", token=ONE)
    assert ONE not in str(caught.value)


def _until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_reply_that_has_begun_is_finished(root: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, f"{ALL}\n")
    with running(tmp_path, "--root", str(root), "--token-file", str(path)) as server:
        parts = urlsplit(server.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        headers = {"Authorization": f"Bearer {ALL}"}
        target = f"/v1/stores/{OURS}/hooks/{_HOOK}/slice"
        connection.request("GET", target, headers=headers)
        reply = connection.getresponse()
        path.unlink()
        _until(lambda: ask(server.url, target, ALL).status == 401)
        assert len(reply.read()) == int(reply.headers["Content-Length"])
        # The connection itself gives no rights.
        connection.request("GET", target, headers=headers)
        assert connection.getresponse().status == 401
        connection.close()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("LocalHost.", True),
        ("store.localhost", True),
        ("::ffff:127.0.0.1", True),
        ("127.1", True),
        ("2130706433", True),
        ("0x7f.1", True),
        ("10.1", False),
        ("127.0.0.1 x", False),
        ("localhost..", False),
        ("xlocalhost", False),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("allowed", "called"),
    [
        ("box.lan", ["box.lan", "BOX.lan:8000", "box.lan."]),
        ("Box.Lan.", ["box.lan"]),
        ("box.lan:8000", ["box.lan:8000", "box.lan:9"]),
        ("bücher.example", ["xn--bcher-kva.example"]),
        ("10.0.0.7:80", ["10.0.0.7", "10.0.0.7:8000"]),
        ("[2001:DB8::1]:8000", ["[2001:db8::1]", "[2001:db8:0::1]:9"]),
        ("2001:db8::1", ["[2001:db8::1]:8000"]),
        (" my_box ", ["my_box"]),
    ],
)
def test_ways_to_write_an_allowed_host(allowed: str, called: list[str]) -> None:
    hosts = Hosts([allowed])
    for host in (*called, "", "127.0.0.1", "LOCALHOST.:80", "[::1]:8000"):
        hosts.check(host)
    for host in ("other.lan", "box.lan.evil.example", "[::2]", "box.lan@evil.example", "a b", "box.lan/x"):
        with pytest.raises(Problem, match="is not called"):
            hosts.check(host)


@pytest.mark.parametrize(
    "allowed",
    ["", "http://box.lan", "*", "*.lan", "box.lan,other", "box lan", "box.lan/", "[box]", "a..b", ":80"],
)
def test_allowed_hosts_that_are_none(
    allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that could never match is refused."""
    assert run(["serve", "--root", str(tmp_path), "--port", "0", "--allowed-host", allowed]) == 1
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert f"--allowed-host has {allowed!r}, which is no name of a machine; give one as" in output.err


@pytest.mark.parametrize("path", ["/", "/docs", "/v1/stores", "/healthz", "/nothing"])
def test_pages_of_other_sites_have_nothing_from_a_server_without_tokens(
    path: str, server: Running, guarded: Running
) -> None:
    """A link to a page, however, may be followed."""
    loads = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    frames = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    visits = frames | {"Sec-Fetch-Dest": "document"}
    for headers in (loads, frames):
        reply = ask(server.url, path, **headers)
        assert reply.status == 403
        assert json.loads(reply.body)["type"] == "urn:actstore:problem:cross-site"
    is_page = path in ("/", "/docs")
    assert (ask(server.url, path, **visits).status == 200) is is_page
    assert (ask(server.url, path, method="POST", **visits).status == 403) is True
    for site in ("same-origin", "same-site", "none"):
        reply = ask(server.url, path, **(loads | {"Sec-Fetch-Site": site}))
        assert reply.status == (404 if path == "/nothing" else 200)
        assert reply.header("cross-origin-resource-policy") == "same-origin"
        if path == "/":
            assert reply.header("cache-control") == "no-store"
    # With tokens, a page would need one, and cannot send it without a preflight request.
    assert ask(guarded.url, path, ALL, **loads).status == (404 if path == "/nothing" else 200)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that is in use, so that no server starts by mistake."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield held.getsockname()[1]


@pytest.fixture
def refused(taken: int, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that returns what ``actstore serve`` prints when it does not start."""

    def error_of(*arguments: str) -> str:
        capsys.readouterr()
        filled = [argument.format(root=root, tmp=tmp_path) for argument in arguments]
        assert run(["serve", *filled, "--port", str(taken)]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        assert "Traceback" not in output.err
        return output.err

    return error_of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--root", "{root}"],
            "127.0.0.1:[0-9]+ cannot be listened at: Address already in use; choose another",
        ),
        (["--root", "{root}", "--host", "0.0.0.0"], "0.0.0.0 can be reached from elsewhere.*--token-file"),
        (["--root", "{root}", "--host", "::"], ":: can be reached from elsewhere"),
        (["--root", "{root}", "--host", "192.0.2.1"], "192.0.2.1 can be reached from elsewhere"),
        (["--root", "{root}", "--host", "example.org"], "example.org can be reached from elsewhere"),
        ([], "nothing to serve"),
        ([f"{{root}}/{OURS}", f"{OURS}={{root}}/{THEIRS}"], f"both named {OURS}; write NAME=URL"),
        ([f"run={{root}}/{OURS}", f"run={{root}}/{THEIRS}"], "both named run"),
        (["{tmp}/nowhere"], "the store nowhere cannot be served: .*nowhere"),
        ([f"{{root}}/{OURS}", "x={tmp}/nowhere"], "the store x cannot be served"),
        (["{root}"], "cannot be served"),
        (["{tmp}/a b"], "has no name that can be part of a URL"),
        (["--root", "{tmp}/clash"], "both named run; serve one of them as NAME=URL"),
        (["--root", "{root}", "--token-file", "{tmp}/nowhere"], "token file .* cannot be read: No such file"),
        (["--root", "{root}", "--token-file", "{tmp}/short"], "line 1 of the token file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_a_server_does_not_start_with(
    arguments: list[str], message: str, refused: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        shutil.copytree(root / OURS, tmp_path / "clash" / folder / "run")
    (tmp_path / "short").write_text("short")
    error = refused(*arguments)
    assert re.search(message, error), error


def test_the_command_ends_with_one_sentence(root: Path) -> None:
    ended = command("serve", "--root", str(root), "--host", "0.0.0.0", "--port", "0", timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert len(ended.stderr.splitlines()) == 1
    assert "give --token-file" in ended.stderr


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrusted certificate of 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    path, key = folder / "certificate.pem", folder / "key.pem"
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    request = ["openssl", "req", "-x509", *options, *names, "-out", str(path), "-keyout", str(key)]
    subprocess.run(request, check=True, capture_output=True, timeout=60)
    return path, key


@pytest.fixture(scope="module")
def encrypted(
    stores: Path, certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server of a store with a name of its own, over HTTPS."""
    path, key = map(str, certificate)
    arguments = (f"mine={stores / WHOLE}", "--ssl-certfile", path, "--ssl-keyfile", key)
    with running(tmp_path_factory.mktemp("encrypted"), *arguments) as server:
        yield server


_READ: Final = """
import sys, actstore
store = actstore.open(sys.argv[1], direct=False)
print(store.hooks, store[sys.argv[2]].numpy(slice(3, 9)).tobytes().hex())
"""


def test_https(encrypted: Running, certificate: tuple[Path, Path], stores: Path) -> None:
    assert encrypted.url.startswith("https://127.0.0.1:")
    environment = {**os.environ, "SSL_CERT_FILE": str(certificate[0])}
    ended = command(f"{encrypted.url}/v1/stores/mine", _HOOK, code=_READ, timeout=120, env=environment)
    store = actstore.open(stores / WHOLE)
    assert ended.stdout == f"{store.hooks} {bits(store).hex()}\n", ended.stderr


def test_a_certificate_that_is_not_trusted(encrypted: Running) -> None:
    with pytest.raises(StorageError, match="certificate is not trusted: self.signed"):
        encrypted.store("mine")


def test_names_of_ones_own(encrypted: Running, certificate: tuple[Path, Path]) -> None:
    parts = urlsplit(encrypted.url)
    context = ssl.create_default_context(cafile=str(certificate[0]))
    for name, status in (("mine", 200), (WHOLE, 404)):
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=30, context=context
        )
        connection.request("GET", f"/v1/stores/{name}")
        assert connection.getresponse().status == status
        connection.close()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["--ssl-certfile", "{tmp}/nowhere"], "nowhere"),
        (["--ssl-certfile", "{certificate}"], "key"),
        (["--ssl-certfile", "{certificate}", "--ssl-keyfile", "{certificate}"], "key"),
        (["--ssl-keyfile", "{key}"], "certificate"),
    ],
)
def test_certificates_that_are_none(
    files: list[str], message: str, certificate: tuple[Path, Path], root: Path, tmp_path: Path
) -> None:
    path, key = certificate
    filled = [argument.format(tmp=tmp_path, certificate=path, key=key) for argument in files]
    ended = command("serve", "--root", str(root), "--port", "0", *filled, timeout=30)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert message in ended.stderr
