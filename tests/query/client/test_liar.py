"""A client refuses the lies of a server in one sentence, at once, without allocating what the lies announce."""

import contextlib
import itertools
import json
import os
import resource
import signal
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch

import actstore
from actstore.errors import LoaderError, StorageError, StoreReplacedError
from actstore.query.client import bounds, server
from actstore.query.client.places import place_of
from actstore.query.client.served_store import ServedStore
from actstore.query.client.server import Server
from actstore.query.wire import CONTENTS, DTYPE, ORDER, SHAPE, STORE
from actstore.storage import retries
from tests.query.client.liar import Liar, Lie, Reply, lying
from tests.query.running import Running
from tests.query.stores import COMPRESSED, GROWN, WHOLE
from tests.store.example import HOOKS, LENGTH, N

HOOK: Final = HOOKS[0]
SHARD: Final = f"acts/{HOOK}/c.0.0.0"
_SPARE_NBYTES: Final = 1 << 30
"""Bytes of address space. Each thread reserves 128 MiB of it."""
_GROWN_KB: Final = 300_000
_QUICK_S: Final = 10.0


@pytest.fixture(scope="module")
def liar(server: Running) -> Iterator[Liar]:
    with lying(server.url) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, liar: Liar) -> Iterator[None]:
    """Retry for a moment, not for minutes, what may be a passing fault."""
    monkeypatch.setattr(server, "_PATIENCE_S", 0.3)
    liar.lie, liar.paths = None, []
    yield
    liar.lie = None


@contextlib.contextmanager
def little_and_quick() -> Iterator[None]:
    """Check that a block takes no more memory, and no more time, than an honest reply."""

    def status(field: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])

    def ring(*_: Any) -> None:
        raise AssertionError("the client still waits")

    Path("/proc/self/clear_refs").write_text("5")  # the peak is the resident memory now
    before, limits = status("VmHWM"), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, ((status("VmSize") << 10) + _SPARE_NBYTES, limits[1]))
    handler = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, _QUICK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert status("VmHWM") - before < _GROWN_KB


def opened(liar: Liar, name: str = WHOLE) -> ServedStore:
    store = actstore.open(f"{liar.url}/v1/stores/{name}", direct=False)
    assert isinstance(store, ServedStore)
    return store


def batch_of(store: ServedStore, **options: Any) -> Any:
    with store.loader(HOOK, batch_size=16, prefetch=0, **options) as loader:
        return loader.batch(0)


Use = Callable[[ServedStore], Any]
USES: Final[dict[str, tuple[str, Use]]] = {
    "store": ("", lambda store: store.reopened()),
    "rows": (f"/hooks/{HOOK}/slice", lambda store: store[HOOK][0:4]),
    "select": ("/select", lambda store: store.cache([3, 17])),
    "statistics": (f"/hooks/{HOOK}/stats", lambda store: store.stats(HOOK)),
    "matches": ("/prompts", lambda store: store.find(tokens=store.tokens[3, 5:6])),
    "order": ("/batches", batch_of),
    "batch": ("/batches/0", batch_of),
    "batch with provenance": ("/batches/0", lambda store: batch_of(store, provenance=True)),
    "object": ("/zarr/_actstore/manifest.json", lambda store: store.blobs.read("_actstore/manifest.json")),
    "range": (f"/zarr/{SHARD}", lambda store: store.blobs.read(SHARD, 64, 640)),
    "head": (f"/zarr/{SHARD}", lambda store: store.blobs.head(SHARD)),
    "place": ("/plan", lambda store: place_of(store.server, "zarr.json")),
}
"""How a client uses each resource: path, and a call."""


def check_refused(liar: Liar, use: str, lie: Lie, name: str = WHOLE) -> str:
    """The error for a lie about one resource, told by a server that was honest when the store was opened."""
    path, act = USES[use]
    store = opened(liar, name)
    liar.lie = lambda reply: lie(reply) if reply.path == path else reply
    with little_and_quick(), pytest.raises(StorageError) as caught:
        act(store)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 900
    assert liar.url in text
    return text


def endless(head: bytes, piece: bytes) -> Iterator[bytes]:
    """Yield as much as the client takes."""
    yield head
    yield from itertools.repeat(piece)


FRAMES: Final[dict[str, Lie]] = {
    "no length": lambda reply: reply.having(content_length=None),
    "negative length": lambda reply: reply.having(content_length="-5"),
    "length of letters": lambda reply: reply.having(content_length="many"),
    "length with an exponent": lambda reply: reply.having(content_length="1e3"),
    "length of digits without end": lambda reply: reply.having(content_length="9" * 5000),
    "two lengths": lambda reply: reply.head[:-2] + b"Content-Length: 7\r\n\r\n" + reply.body,
    "huge length": lambda reply: endless(reply.having(content_length=str(10**17)).head, bytes(1 << 16)),
    "endless chunks": lambda reply: endless(
        reply.having(content_length=None, transfer_encoding="chunked").head,
        b"10000\r\n" + bytes(1 << 16) + b"\r\n",
    ),
    "a chunk of less than nothing": lambda reply: endless(
        reply.having(content_length=None, transfer_encoding="chunked").head + b"-1\r\n", bytes(1 << 16)
    ),
    "no status": lambda _: b"SSH-2.0-OpenSSH_9.6\r\n" * 20,
    "endless headers": lambda reply: endless(reply.head[:-2], b"X: " + b"a" * 60_000 + b"\r\n"),
    "endless line": lambda _: endless(b"HTTP/1.1 200 ", b"a" * 60_000),
    "endless promises": lambda _: endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "no content": lambda reply: b"HTTP/1.1 204 Said\r\n" + reply.head.partition(b"\r\n")[2],
    "another protocol": lambda reply: b"HTTP/1.1 101 Said\r\n" + reply.head.partition(b"\r\n")[2],
    "elsewhere": lambda _: b"HTTP/1.1 302 Said\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "another store": lambda reply: reply.having(**{STORE: None}),
    "the name of another store": lambda reply: reply.having(**{STORE: "0" * 32}),
}


NO_LIES: Final = {
    ("huge length", "head"),
    ("another store", "store"),
    ("the name of another store", "store"),
}
"""An object may have any size, of which nothing is read here; and any store may be opened."""


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("frame", FRAMES)
def test_frames(frame: str, use: str, liar: Liar) -> None:
    if (frame, use) in NO_LIES:
        pytest.skip("it may be so")
    n_asked = len(liar.paths)
    check_refused(liar, use, FRAMES[frame])
    assert liar.paths[n_asked:].count(USES[use][0]) <= 3  # not requested again and again


@pytest.mark.parametrize("use", [use for use in USES if use != "head"])
@pytest.mark.parametrize("kept", [0, 7, -1])
def test_bodies_that_are_cut_off(kept: int, use: str, liar: Liar) -> None:
    message = check_refused(liar, use, lambda reply: reply.head + reply.body[:kept])
    assert "cut off" in message


@pytest.mark.parametrize("use", USES)
def test_heads_that_are_cut_off(use: str, liar: Liar) -> None:
    """Without its last lines, a head would have another meaning."""
    assert "cut off" in check_refused(liar, use, lambda reply: reply.head[:40])


@pytest.mark.parametrize("use", ["rows", "select", "batch", "batch with provenance", "range"])
@pytest.mark.parametrize("n_more", [-1, 1, 1 << 40])
def test_bodies_of_another_length(n_more: int, use: str, liar: Liar) -> None:
    def lie(reply: Reply) -> Iterator[bytes]:
        body = reply.body + bytes(max(0, min(n_more, 16)))
        return iter([reply.having(content_length=str(len(reply.body) + n_more)).head, body])

    check_refused(liar, use, lie)


def test_bytes_behind_a_reply_are_not_the_next_one(liar: Liar) -> None:
    store, bits = opened(liar), opened(liar)[HOOK][0:4]
    liar.lie = lambda reply: reply.raw + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    for _ in range(3):
        assert torch.equal(store[HOOK][0:4].view(torch.int16), bits.view(torch.int16))


def test_a_reply_that_is_not_read_to_its_end_leaves_nothing_behind(liar: Liar) -> None:
    """Its connection is not used for the next request, whose reply would begin with the rest."""
    store = opened(liar)
    url = f"{store.server.url}/hooks/{HOOK}/slice?seq=0:4"
    with store.server.connections.request("GET", url, {}) as reply:
        assert reply.read(5)
    with store.server.connections.request("GET", url, {}) as reply:
        assert len(reply.read()) == 4 * LENGTH * 16 * 2


def test_a_forked_process_has_connections_of_its_own(liar: Liar) -> None:
    """Two processes that write requests into one connection would read each other's replies."""
    connections = opened(liar).server.connections

    def port() -> int:
        """Port of this end of the connection that is kept for the next request."""
        with connections.request("GET", f"{liar.url}/healthz", {}) as reply:
            reply.read()
        ((kept,),) = connections._idle.values()
        return int(kept.sock.getsockname()[1])

    ours = port()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not need
        child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os._exit(0 if port() != ours else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert port() == ours


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(
    status: int, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds while it is started again: a load balancer then answers 502 without a document of ours, and a
    server that is ended in the middle of a request 500.
    """
    monkeypatch.setattr(server, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)
    store = opened(liar)
    expected = store[HOOK][0:4]
    replies = iter([False, False])
    busy = f"HTTP/1.1 {status} Said\r\nContent-Length: 4\r\n\r\nbusy".encode()
    liar.lie = lambda reply: reply if next(replies, True) else busy
    assert torch.equal(store[HOOK][0:4].view(torch.int16), expected.view(torch.int16))
    assert store.server.n_retries == 2


def test_another_store_in_the_place_of_the_one_that_was_opened(liar: Liar) -> None:
    """Both stores have the same plan: only the contents differ, which the client requests when their label is new."""
    store = opened(liar)

    def other(document: Any) -> None:
        document["contents"] = [f"{content[:-8]}00000000" for content in document["contents"]]

    def lie(reply: Reply) -> Reply:
        changed = reply.saying(other) if reply.path == "" else reply
        return changed.having(**{CONTENTS: "1-" + "0" * 32})

    liar.lie = lie
    with little_and_quick(), pytest.raises(StoreReplacedError, match="open it again"):
        store[HOOK][0:4]


def test_a_place_that_holds_another_store(liar: Liar, stores: Path) -> None:
    """The other store has as many runs, with the same names."""

    def change(document: Any) -> None:
        document["places"][0]["url"] = document["places"][0]["url"].replace(f"/{WHOLE}/", f"/{COMPRESSED}/")

    liar.lie = lambda reply: reply.saying(change) if reply.path == "/plan" else reply
    with pytest.raises(
        StorageError, match=f"what is at {stores}/{COMPRESSED}/ is another store, or a part of it"
    ):
        actstore.open(f"{liar.url}/v1/stores/{WHOLE}", direct=True)
    store = actstore.open(f"{liar.url}/v1/stores/{WHOLE}")
    assert torch.equal(store[HOOK][0:4].view(torch.int16), opened(liar)[HOOK][0:4].view(torch.int16))


def test_batches_of_another_order(liar: Liar) -> None:
    """It happens after a server was started again over other tokens."""
    with opened(liar).loader(HOOK, batch_size=16, prefetch=0) as loader:
        loader.batch(0)
        liar.lie = lambda reply: reply.having(**{ORDER: "0" * 32}) if reply.path == "/batches/0" else reply
        with pytest.raises(LoaderError, match="is not what it was when this loader was made"):
            loader.batch(0)


DEEP: Final = b'{"a":' * 30_000 + b"1" + b"}" * 30_000
DOCUMENTS: Final[dict[str, Lie]] = {
    "gigabytes": lambda reply: endless(reply.having(content_length=str(3 << 30)).head, b" " * 65536),
    "deep": lambda reply: reply.having(DEEP),
    "deep lists": lambda reply: reply.having(b"[" * 100_000),
    "values without end": lambda reply: reply.having(b'{"a":[' + b"0," * (3 << 20) + b"0]}"),
    "a number without end": lambda reply: reply.having(b'{"a":' + b"9" * 5_000_000 + b"}"),
    "nothing": lambda reply: reply.having(b""),
    "null": lambda reply: reply.having(b"null"),
    "no JSON": lambda reply: reply.having(b"<html>\x1b[31m\n</html>"),
    "no text": lambda reply: reply.having(b"\xff\xfe\x00"),
    "a list": lambda reply: reply.having(b"[]"),
}


@pytest.mark.parametrize("use", ["store", "statistics", "matches", "order", "place"])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents(kind: str, use: str, liar: Liar) -> None:
    check_refused(liar, use, DOCUMENTS[kind])


def run(change: Callable[[dict[str, Any]], Any], number: int = 0) -> Lie:
    return lambda reply: reply.saying(lambda document: change(document["runs"][number]) and None)


def put(place: str, value: Any) -> Lie:
    """A lie that changes one field of a document."""

    def change(document: Any) -> None:
        *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        for part in path:
            document = document[part]
        document[last] = value

    return lambda reply: reply.saying(change)


def unfinished(committed: Any, **plan: Any) -> Lie:
    def change(document: dict[str, Any]) -> None:
        document["runs"][0] |= {"committed": committed, "finished": None}
        document["runs"][0]["plan"] |= plan

    return lambda reply: reply.saying(change)


STORES: Final[dict[str, Lie]] = {
    "10^13 segments": unfinished([[0, 10**13]]),
    "10^400 segments": unfinished([[0, 10**400]]),
    "10^13 segments of as many": unfinished([[1, 10**13]], n_sequences=1 << 47, segment_size=1),
    "a segment too many": unfinished([[0, 4]]),
    "reversed": unfinished([[2, 1]]),
    "empty": unfinished([[1, 1]]),
    "negative": unfinished([[-1, 2]]),
    "overlapping": unfinished([[0, 2], [1, 3]]),
    "twice": unfinished([[0, 1], [0, 1]]),
    "out of order": unfinished([[2, 3], [0, 1]]),
    "a triple": unfinished([[0, 1, 2]]),
    "no numbers": unfinished([["a", "b"]]),
    "many of them": unfinished([[0, 1]] * 400_000),
    "many that are none": unfinished([0] * 400_000),
    "finished, and not all of it": put("runs.0.committed", [[0, 1]]),
    "no runs": put("runs", []),
    "another first run": put("runs.0.plan.run", "0001"),
    "a run twice": lambda reply: reply.saying(lambda document: document["runs"].append(document["runs"][0])),
    "contents of another number of runs": put("contents", []),
    "contents of numbers": put("contents", [1] * 400_000),
    "more fields than there are": lambda reply: reply.saying(
        lambda document: document["runs"][0]["plan"].update({f"a{n}": 0 for n in range(200_000)})
    ),
    "a hook of another type": put("runs.0.plan.request.dtype", "object"),
    "a shape of 9 axes": put("runs.0.plan.request.hooks.0.shape", [2] * 9),
    "sequences without end": put("runs.0.plan.n_sequences", 10**18),
    "no sequences": put("runs.0.plan.n_sequences", -1),
    "finished with another plan": put("runs.0.finished.plan.n_tokens", 7),
}


@pytest.mark.parametrize("kind", STORES)
def test_stores(kind: str, liar: Liar) -> None:
    check_refused(liar, "store", STORES[kind])


def test_a_vast_store_that_is_not_there(liar: Liar) -> None:
    """Such a store can exist: its description takes no memory until rows are read."""
    sizes = {"n_sequences": 1 << 47, "segment_size": 1 << 20, "n_tokens": 1 << 60}
    liar.lie = unfinished([[0, 1 << 23], [1 << 24, (1 << 24) + 5]], **sizes)
    with little_and_quick():
        store = opened(liar)
        assert repr(store)
        assert store.n_committed == (1 << 23) + 5
        assert store.n_sequences_committed == ((1 << 23) + 5) << 20
        assert store.newer().runs == store.runs
        with pytest.raises(actstore.errors.NotCommittedError):
            store[HOOK][1 << 45]


KINDS: Final[dict[str, dict[str, str | None]]] = {
    "huge": {SHAPE: "1000000000000,128"},
    "negative": {SHAPE: "-5,128"},
    "a million axes": {SHAPE: ",".join("1" * 30_000)},
    "no shape": {SHAPE: None},
    "letters": {SHAPE: "a,b"},
    "another order": {SHAPE: "16,8,4"},
    "another type": {DTYPE: "float16"},
    "a wider type": {DTYPE: "float64"},
    "an attribute of torch": {DTYPE: "load"},
    "no type": {DTYPE: None},
}


@pytest.mark.parametrize("use", ["rows", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_bytes(kind: str, use: str, liar: Liar) -> None:
    message = check_refused(liar, use, lambda reply: reply.having(**KINDS[kind]))
    assert "bfloat16 of shape" in message


def header(change: Callable[[dict[str, Any]], Any]) -> Lie:
    """A lie in the header of safetensors, whose announced length is right."""

    def lie(reply: Reply) -> Reply:
        size = int.from_bytes(reply.body[:8], "little")
        fields = json.loads(reply.body[8 : 8 + size])
        changed = change(fields)
        text = changed if isinstance(changed, bytes) else json.dumps(fields).encode()
        return reply.having(struct.pack("<Q", len(text)) + text + reply.body[8 + size :])

    return lie


def first(**values: Any) -> Lie:
    return header(lambda fields: next(iter(fields.values())).update(values))


HEADERS: Final[dict[str, Lie]] = {
    "huge": lambda reply: reply.having(struct.pack("<Q", 1 << 60) + reply.body[8:]),
    "99 MiB": lambda reply: reply.having(struct.pack("<Q", 99 << 20) + reply.body[8:]),
    "empty": lambda reply: reply.having(struct.pack("<Q", 0) + reply.body[8:]),
    "no bytes": lambda reply: reply.having(b"\1\2"),
    "deep": header(lambda _: b'{"a":' * 1000),
    "deep, and closed": header(lambda _: b"[" * 2000 + b"]" * 2000),
    "a list": header(lambda _: b"[1,2]"),
    "shape overflows": first(shape=[1 << 40, 1 << 40]),
    "negative shape": first(shape=[-1, -8, 16]),
    "offsets overlap": first(data_offsets=[0, 8]),
    "offsets beyond": first(data_offsets=[0, 1 << 50]),
    "negative offsets": first(data_offsets=[-8, 0]),
    "offsets of letters": first(data_offsets="ab"),
    "another type": first(dtype="F64"),
    "a type that is none": first(dtype="load"),
    "a name too many": header(
        lambda fields: fields.update(a={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    ),
    "other names": header(lambda fields: fields.update({"a": fields.pop(next(iter(fields)))})),
    "a name twice": header(
        lambda fields: (
            json.dumps(fields).encode()[:-1]
            + b", "
            + json.dumps(dict([next(iter(fields.items()))])).encode()[1:]
        )
    ),
    "a name too few": header(lambda fields: fields.popitem() and None),
}


@pytest.mark.parametrize("use", ["select", "batch with provenance"])
@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_safetensors(kind: str, use: str, liar: Liar) -> None:
    check_refused(liar, use, HEADERS[kind])


ORDERS: Final[dict[str, Lie]] = {
    "rows without end": put("n_rows", 10**18),
    "more rows than there are": put("n_rows", N * LENGTH + 1),
    "rows beyond 64 bits": put("n_rows", 10**40),
    "negative rows": put("n_rows", -1),
    "no rows": put("n_rows", 0),
    "batches without end": put("n_batches", 10**18),
    "negative batches": put("n_batches", -1),
    "no batches": put("n_batches", 0),
    "letters": put("n_rows", "many"),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_orders(kind: str, liar: Liar) -> None:
    check_refused(liar, "order", ORDERS[kind])


MATCHES: Final[dict[str, Any]] = {
    "beyond the store": ([N], [0]),
    "beyond the sequence": ([0], [LENGTH]),
    "negative": ([-1], [0]),
    "negative positions": ([0], [-1]),
    "beyond 64 bits": ([10**30], [0]),
    "more of one": ([0, 1], [0]),
    "twice": ([3, 3], [5, 5]),
    "out of order": ([4, 3], [5, 5]),
    "fractions": ([0.5], [0]),
    "letters": (["a"] * 500_000, ["b"] * 500_000),
    "more than a server gives": ([0] * 1_000_001, [0] * 1_000_001),
}


@pytest.mark.parametrize("kind", MATCHES)
def test_matches(kind: str, liar: Liar) -> None:
    sequences, positions = MATCHES[kind]
    document = {"sequences": sequences, "positions": positions}
    check_refused(liar, "matches", lambda reply: reply.saying(lambda _: document))


def test_more_matches_than_were_asked_for(liar: Liar) -> None:
    store = opened(liar)
    liar.lie = lambda reply: reply.saying(lambda _: {"sequences": [1, 2, 3], "positions": [0, 0, 0]})
    with little_and_quick(), pytest.raises(StorageError, match="at most 2"):
        store.find(tokens=[1], limit=2)


STATISTICS: Final[dict[str, Lie]] = {
    "another hook": put("hook", HOOKS[1]),
    "another shape": put("shape", [17]),
    "a huge shape": put("shape", [10**12]),
    "axes without end": put("shape", [1] * 500_000),
    "letters": put("record.count", "many"),
    "infinite": lambda reply: reply.having(
        reply.body.replace(b'"sum_of_norms":', b'"sum_of_norms":1e999,"a":')
    ),
    "not a number": lambda reply: reply.having(
        reply.body.replace(b'"sum_of_norms":', b'"sum_of_norms":NaN,"a":')
    ),
    "negative": put("record.count", -1),
    "a count of its own": put("record.count", 1),
    "a sum of more elements": put("record.sum", "A" * 1_000_000),
    "a sum of letters": put("record.sum", "?" * 171),
    "a moment of another size": put("record.second_moment", "AAAA"),
    "buckets that are none": put("record.norms.buckets", [[0, 0]] * 300_000),
    "no record": put("record", None),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics(kind: str, liar: Liar) -> None:
    check_refused(liar, "statistics", STATISTICS[kind])


def place(url: str, kind: str) -> Lie:
    def change(document: dict[str, Any]) -> None:
        document["places"][0] |= {"url": url, "kind": kind}

    return lambda reply: reply.saying(change)


PLACES: Final[dict[str, Lie]] = {
    "a cache of files": place("simplecache::file:///etc/zarr.json", "storage"),
    "a chain in the path": place("gs://a/b::file:///etc/zarr.json", "storage"),
    "a chain of a presigned URL": place("simplecache::https://a/zarr.json", "http"),
    "a file as storage": place("file:///etc/zarr.json", "storage"),
    "a path as storage": place("/etc/zarr.json", "storage"),
    "local": place("local:///etc/zarr.json", "storage"),
    "http as storage": place("http://127.0.0.1/zarr.json", "storage"),
    "memory": place("memory://a/zarr.json", "storage"),
    "ssh": place("ssh://a/zarr.json", "storage"),
    "github": place("github://a:b@c/zarr.json", "storage"),
    "a URL as a path": place("s3://a/zarr.json", "file"),
    "a path that climbs": place("/a/../etc/zarr.json", "file"),
    "another path": place("/etc/passwd", "file"),
    "a relative path": place("etc/zarr.json", "file"),
    "ftp": place("ftp://a/zarr.json", "http"),
    "file as a presigned URL": place("file:///etc/zarr.json", "http"),
    "a name and a password": place("http://a:b@127.0.0.1/zarr.json", "http"),
    "no host": place("http:///zarr.json", "http"),
    "no port": place("http://a:99999/zarr.json", "http"),
    "half an address": place("http://[::1/zarr.json", "http"),
    "another line": place("http://127.0.0.1/zarr.json\r\nX: y", "http"),
    "another kind": place("s3://a/zarr.json", "else"),
    "another key": put("places.0.key", "other"),
    "no place": put("places", []),
    "two places": lambda reply: reply.saying(
        lambda document: document["places"].append(document["places"][0])
    ),
    "a read before the beginning": put(
        "reads", [{"place": 0, "offset": -1, "nbytes": 4, "array": 0, "destination": 0}]
    ),
    "a read to nowhere": put(
        "reads", [{"place": 9, "offset": 0, "nbytes": 4, "array": 0, "destination": 10**18}]
    ),
    "an array": put("arrays", [{"name": "a", "dtype": "float32", "shape": [10**12], "nbytes": 4 * 10**12}]),
    "good for less than nothing": put("expires_s", -1),
    "good for ever": put("expires_s", 10**12),
}


@pytest.mark.parametrize("kind", PLACES)
def test_places(kind: str, liar: Liar) -> None:
    check_refused(liar, "place", PLACES[kind])


@pytest.mark.parametrize(
    ("url", "server_url", "kind", "is_allowed"),
    [
        ("https://s3.example.org/a/k?X-Amz-Signature=a::b", "https://a/v1/stores/b", "http", True),
        ("http://s3.example.org/a/k", "http://a/v1/stores/b", "http", True),
        ("http://s3.example.org/a/k", "https://a/v1/stores/b", "http", False),
        ("http://169.254.169.254/k", "http://a/v1/stores/b", "http", False),
        ("http://127.0.0.1:9000/k", "http://a/v1/stores/b", "http", False),
        ("http://127.0.0.1:9000/k", "http://localhost/v1/stores/b", "http", True),
        ("http://127.0.0.1:9000/k", "http://LOCALHOST./v1/stores/b", "http", True),
        # Other spellings of an address of this machine, or of a service that hands out its credentials.
        ("http://127.1:9000/k", "http://a/v1/stores/b", "http", False),
        ("http://2130706433/k", "http://a/v1/stores/b", "http", False),
        ("http://0.0.0.0:9000/k", "http://a/v1/stores/b", "http", False),
        ("http://0/k", "http://a/v1/stores/b", "http", False),
        ("http://[::]/k", "http://a/v1/stores/b", "http", False),
        ("http://[::ffff:127.0.0.1]/k", "http://a/v1/stores/b", "http", False),
        ("http://localhost./k", "http://a/v1/stores/b", "http", False),
        ("http://[::ffff:169.254.169.254]/k", "http://a/v1/stores/b", "http", False),
        ("http://0xa9fea9fe/k", "http://a/v1/stores/b", "http", False),
        ("http://10.1:9000/k", "http://a/v1/stores/b", "http", True),
        ("/runs/k", "http://127.0.0.1/v1/stores/b", "file", True),
        ("/runs/k", "http://[::1]/v1/stores/b", "file", True),
        ("/runs/k", "http://10.0.0.1/v1/stores/b", "file", False),
        ("/runs/k", "http://127.0.0.1.example.org/v1/stores/b", "file", False),
        ("s3://bucket/k", "http://a/v1/stores/b", "storage", True),
        ("gs://bucket/k", "http://a/v1/stores/b", "storage", True),
        ("az://bucket/k", "http://a/v1/stores/b", "storage", True),
        ("hf://bucket/k", "http://a/v1/stores/b", "storage", False),
    ],
)
def test_where_a_client_goes(url: str, server_url: str, kind: Any, is_allowed: bool) -> None:
    from actstore.query.client.places import _is_allowed
    from actstore.query.documents import Place

    assert _is_allowed(Place(key="k", url=url, kind=kind), server_url) is is_allowed


@pytest.mark.parametrize("key", ["zarr.json", SHARD])
def test_zarr_follows_no_redirect(key: str, liar: Liar, server: Running) -> None:
    """The redirect may lead to what only this machine can reach."""
    store = opened(liar)

    def read() -> Any:
        group: Any = store.zarr
        return group["acts"][HOOK][:]

    place = f"{server.url}/v1/stores/{WHOLE}/zarr/{key}"
    head = f"HTTP/1.1 302 Said\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()
    liar.lie = lambda reply: head if reply.path == f"/zarr/{key}" else reply
    with pytest.raises(StorageError, match=f"redirects to {place}, and redirects are not followed"):
        read()
    liar.lie = lambda reply: reply
    assert len(read()) == store.shape[0]


@pytest.mark.parametrize("given", ["bytes 0-639/6400", "bytes 64-703", "items 64-703/6400", ""])
def test_other_ranges(given: str, liar: Liar) -> None:
    check_refused(liar, "range", lambda reply: reply.having(content_range=given))


def test_tags_that_change_or_are_absent(liar: Liar) -> None:
    """ETags decide nothing: the headers with its contents tell that all is of one store."""
    store, tags = opened(liar), itertools.count()
    bits = bytes(store.blobs.read(SHARD, 64, 640))
    liar.lie = lambda reply: reply.having(etag=f'"{next(tags)}"')
    assert bytes(store.blobs.read(SHARD, 64, 320)) + bytes(store.blobs.read(SHARD, 384, 320)) == bits
    liar.lie = lambda reply: reply.having(etag=None)
    assert bytes(store.blobs.read(SHARD, 64, 640)) == bits
    assert store.blobs.head(SHARD) is not None
    liar.lie = lambda reply: reply.having(**{CONTENTS: "9-0"})
    with little_and_quick(), pytest.raises(StorageError):
        store.blobs.read(SHARD, 64, 640)


PROBLEMS: Final[dict[str, bytes]] = {
    "deep": b"[" * 60_000,
    "lines and colours": json.dumps({"type": "a", "detail": "\x1b[31m\nline\n" * 2000}).encode(),
    "no text": json.dumps({"type": ["a"], "detail": {"a": [1] * 1000}}).encode(),
    "a list": b"[1]",
    "long": b'{"detail":"' + b"a" * 50_000 + b'"}',
}


@pytest.mark.parametrize("status", [400, 404, 418, 500, 502, 503])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_problems(kind: str, status: int, liar: Liar) -> None:
    store = opened(liar)

    def lie(reply: Reply) -> bytes:
        raw = reply.having(PROBLEMS[kind], content_type="application/problem+json").raw
        return f"HTTP/1.1 {status} Said\r\n".encode() + raw.partition(b"\r\n")[2]

    liar.lie = lie
    with little_and_quick(), pytest.raises(StorageError) as caught:
        store[HOOK][0:4]
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2_500


@pytest.mark.parametrize(
    ("content_type", "is_problem"),
    [
        ("application/problem+json", True),
        ("Application/Problem+JSON ; charset=utf-8", True),
        ("application/problem+json5", False),
    ],
)
def test_types_of_problems(content_type: str, is_problem: bool, liar: Liar) -> None:
    store = opened(liar)
    problem = json.dumps({"type": "urn:actstore:problem:x", "detail": "all rows are out"}).encode()

    def lie(reply: Reply) -> bytes:
        raw = reply.having(problem, content_type=content_type).raw
        return b"HTTP/1.1 400 Said\r\n" + raw.partition(b"\r\n")[2]

    liar.lie = lie
    with little_and_quick(), pytest.raises(StorageError) as caught:
        store[HOOK][0:4]
    assert ("all rows are out" in str(caught.value)) == is_problem


def test_a_problem_without_end(liar: Liar) -> None:
    store = opened(liar)
    liar.lie = lambda reply: endless(
        b"HTTP/1.1 500 Said\r\nContent-Type: application/problem+json\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"10000\r\n" + bytes(1 << 16) + b"\r\n",
    )
    with little_and_quick(), pytest.raises(StorageError, match="status 500"):
        store[HOOK][0:4]


def dripping(head: bytes, rest: bytes) -> Iterator[bytes]:
    """Yield a byte now and then, before the wait for the next one would end."""
    yield head
    for number in range(len(rest)):
        time.sleep(0.1)
        yield rest[number : number + 1]


@pytest.mark.parametrize("use", ["store", "rows", "batch", "object"])
@pytest.mark.parametrize("part", ["head", "body"])
def test_bytes_that_drip(part: str, use: str, liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "READ_S", 0.5)

    def lie(reply: Reply) -> Iterator[bytes]:
        return dripping(b"", reply.raw) if part == "head" else dripping(reply.head, reply.body)

    assert f"bytes of the {part} of its reply came, and no more in" in check_refused(liar, use, lie)


def test_what_comes_fast_enough_takes_as_long_as_it_takes(
    liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply without any byte would be refused sooner."""
    monkeypatch.setattr(bounds, "READ_S", 0.5)
    monkeypatch.setattr(bounds, "SLOWEST", 1 << 10)
    store = opened(liar)
    bits = store[HOOK][0:16]

    def lie(reply: Reply) -> Iterator[bytes]:
        yield reply.head
        step = len(reply.body) // 8
        for start in range(0, len(reply.body), step):
            time.sleep(0.1)
            yield reply.body[start : start + step]

    liar.lie = lie
    assert torch.equal(store[HOOK][0:16].view(torch.int16), bits.view(torch.int16))


def test_the_guard_of_these_tests_sees_what_it_is_for() -> None:
    with pytest.raises(MemoryError), little_and_quick():
        bytearray(2 << 30)
    with pytest.raises(AssertionError), little_and_quick():
        assert bytearray(400 << 20).count(1) == 0


def test_a_grown_store_is_believed(liar: Liar, server: Running) -> None:
    """An honest server may have gaps between its ranges of segments."""
    ours, theirs = opened(liar, GROWN), server.store(GROWN, direct=False)
    assert ours.runs == theirs.runs
    assert [sorted(run.committed) for run in ours.runs] == [[0, 1, 2], [0, 2], [1]]
    assert Server(ours.url, None).url == ours.url
