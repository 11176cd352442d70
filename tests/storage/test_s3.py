"""Blobs on S3 through each client: one PUT whatever the size, retries, lost replies, a sentence for each failure."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from actstore.errors import StorageError
from actstore.storage import retries
from actstore.storage.blobs import ATTEMPT, BlobNotFoundError, Blobs
from actstore.storage.opening import open_blobs
from actstore.storage.probing import probe
from tests.conftest import S3Server
from tests.faults.fault_plan import Fault, Plan, Request, always
from tests.faults.proxy import FaultProxy
from tests.faults.proxy import proxy as fault_proxy

pytestmark = pytest.mark.usefixtures("client")

BODY = bytes(range(256)) * 400
OPERATIONS: dict[str, Callable[[Blobs], object]] = {
    "create": lambda blobs: blobs.create("key", [b"x"]),
    "replace": lambda blobs: blobs.replace("key", [b"x"], expected='"0"'),
    "read": lambda blobs: blobs.read("key"),
    "read_into": lambda blobs: blobs.read_into("key", 0, np.empty(3, np.uint8)),
    "head": lambda blobs: blobs.head("key"),
    "names": lambda blobs: blobs.names("key"),
    "sizes": lambda blobs: blobs.sizes("key"),
    "delete": lambda blobs: blobs.delete("key"),
}


def complaint(blobs: Blobs, operation: str) -> str:
    """The text of the error that an operation on this storage raises."""
    with pytest.raises(StorageError) as caught:
        OPERATIONS[operation](blobs)
    assert not isinstance(caught.value, BlobNotFoundError)
    return str(caught.value)


def test_large_blob_is_one_put(s3_url: str, s3_server: S3Server) -> None:
    # s3fs would cut everything from 100 MiB on into parts, obstore everything from 5 MiB on.
    body = np.random.default_rng(0).integers(0, 256, 101 << 20, dtype=np.uint8)
    blobs = open_blobs(s3_url)
    assert blobs.create("large", [body, b"end"])
    _, key = s3_url.removeprefix("s3://").split("/", 1)
    found = s3_server.client().head_object(Bucket=s3_server.bucket, Key=f"{key}/large")
    assert found["ContentLength"] == body.nbytes + 3
    assert "-" not in found["ETag"]
    assert bytes(blobs.read("large", body.nbytes - 5, 8)) == body[-5:].tobytes() + b"end"


def test_metadata_is_kept_beside_the_attempt(s3_url: str, s3_server: S3Server) -> None:
    blobs = open_blobs(s3_url)
    blobs.create("a", [b"x"], metadata={"crc32c": "0badf00d"})
    info = blobs.head("a")
    assert info is not None
    assert set(info.metadata) == {"crc32c", ATTEMPT}
    assert info.metadata["crc32c"] == "0badf00d"
    _, key = s3_url.removeprefix("s3://").split("/", 1)
    found = s3_server.client().head_object(Bucket=s3_server.bucket, Key=f"{key}/a")
    assert (found["Metadata"], found["ETag"]) == (info.metadata, info.tag)


# Faults.


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between the clients and the server. Pauses are short; what is drawn for them is not under test."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.001)
    with fault_proxy(s3_server.endpoint) as state:
        monkeypatch.setenv("AWS_ENDPOINT_URL", state.url)
        yield state


def first(n: int, fault: Fault, method: str) -> Plan:
    """The first requests of this method fail, each key for itself."""

    def plan(request: Request) -> Fault | None:
        return fault if request.method == method and request.turn < n else None

    return plan


def _read_into(blobs: Blobs) -> bytes:
    out = np.zeros(len(BODY) - 10, np.uint8)
    blobs.read_into("there", 10, out)
    return out.tobytes()


RETRIED: dict[str, tuple[str, Callable[[Blobs], object], object]] = {
    "create": ("PUT", lambda blobs: blobs.create("new", [BODY]), True),
    "read": ("GET", lambda blobs: bytes(blobs.read("there")), BODY),
    "range": ("GET", lambda blobs: bytes(blobs.read("there", 5, 90_000)), BODY[5:90_005]),
    "read_into": ("GET", _read_into, BODY[10:]),
    "head": ("HEAD", lambda blobs: (blobs.head("there") or pytest.fail("gone")).nbytes, len(BODY)),
    "names": ("GET", lambda blobs: blobs.names("folder"), ["a"]),
    "sizes": ("GET", lambda blobs: blobs.sizes("folder"), {"a": 1}),
    "delete": ("DELETE", lambda blobs: blobs.delete("folder/a"), None),
}


@pytest.mark.parametrize("fault", ["refuse", "break", "cut body", "lose reply"])
def test_passing_faults_are_retried_and_counted(s3_url: str, proxy: FaultProxy, fault: Fault) -> None:
    blobs = open_blobs(s3_url)
    blobs.create("there", [BODY])
    blobs.create("folder/a", [b"x"])
    for operation, (method, act, expected) in RETRIED.items():
        before = blobs.n_retries
        proxy.forget()
        proxy.plan = first(2, fault, method)
        assert (operation, act(blobs)) == (operation, expected)
        n_struck = 0 if fault == "cut body" and method != "GET" else 2
        assert (operation, proxy.faults[fault]) == (operation, n_struck)
        assert (operation, blobs.n_retries - before) == (operation, n_struck)


def test_create_knows_its_own_blob_though_the_reply_was_lost(s3_url: str, proxy: FaultProxy) -> None:
    blobs = open_blobs(s3_url)
    proxy.plan = first(1, "lose reply", "PUT")
    assert blobs.create("a", [BODY], metadata={"who": "us"}) is True
    assert blobs.n_retries == 1
    proxy.forget()
    assert blobs.create("a", [BODY], metadata={"who": "us"}) is False  # the same, and yet not this call's
    assert bytes(blobs.read("a")) == BODY


def test_create_after_a_lost_request_leaves_the_blob_of_another(s3_url: str, proxy: FaultProxy) -> None:
    open_blobs(s3_url).create("a", [b"theirs"])
    proxy.forget()
    blobs = open_blobs(s3_url)
    proxy.plan = first(2, "lose reply", "PUT")
    assert blobs.create("a", [b"ours"]) is False
    assert bytes(blobs.read("a")) == b"theirs"


def test_replace_knows_its_own_blob_though_the_reply_was_lost(s3_url: str, proxy: FaultProxy) -> None:
    blobs = open_blobs(s3_url)
    blobs.create("a", [b"old"])
    info = blobs.head("a")
    assert info is not None
    proxy.forget()
    proxy.plan = first(2, "lose reply", "PUT")
    assert blobs.replace("a", [b"new"], expected=info.tag) is True
    assert blobs.n_retries == 2
    proxy.forget()
    assert blobs.replace("a", [b"newer"], expected=info.tag) is False
    assert bytes(blobs.read("a")) == b"new"


@pytest.mark.parametrize(("operation", "method"), [("create", "PUT"), ("read", "GET"), ("head", "HEAD")])
@pytest.mark.parametrize("fault", ["refuse", "lose reply"])
def test_lasting_faults_end_in_one_sentence(
    s3_url: str, proxy: FaultProxy, operation: str, method: str, fault: Fault
) -> None:
    proxy.plan = always(fault)
    blobs = open_blobs(s3_url)
    with pytest.raises(StorageError, match=f"^{s3_url}/key cannot be ") as caught:
        OPERATIONS[operation](blobs)
    assert f"; tried {retries.MAX_TRIES} times in " in str(caught.value)
    hint = "; the same command goes on from what is committed"
    assert str(caught.value).endswith(hint) == (operation == "create")
    # The clients repeat nothing by themselves.
    assert [request.method for request in proxy.requests] == [method] * retries.MAX_TRIES
    assert blobs.n_retries == retries.MAX_TRIES - 1


def test_final_failures_are_not_retried(
    s3_url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    blobs = open_blobs(s3_url)
    for operation in OPERATIONS:
        proxy.forget()
        message = complaint(blobs, operation)
        assert message.startswith(f"{s3_url}/key cannot be ")
        assert "access denied to these credentials" in message
        assert (operation, len(proxy.requests)) == (operation, 1)


def test_probe_sees_that_conditions_get_lost(s3_url: str, proxy: FaultProxy) -> None:
    proxy.without = ("If-None-Match",)
    blobs = open_blobs(s3_url)
    assert probe(blobs) is False
    assert blobs.names("_actstore/probe") == []


# What users get wrong.


def test_credentials_that_may_only_read(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_blobs(s3_url).create("there", [b"there"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    blobs = open_blobs(s3_url)
    assert bytes(blobs.read("there")) == b"there"
    assert blobs.names("") == ["there"]
    with pytest.raises(StorageError, match="cannot be written: access denied to these credentials"):
        probe(blobs)
    with pytest.raises(StorageError, match="there cannot be deleted: access denied to these credentials"):
        blobs.delete("there")


def test_no_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    blobs = open_blobs(s3_url)
    for operation in OPERATIONS:
        message = complaint(blobs, operation)
        assert message.startswith(f"{s3_url}/key cannot be ")
        assert message.endswith(
            ": no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this "
            "machine a role"
        )


def test_credentials_set_after_a_failure_are_used(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a notebook: the error says which variables to set, the next call must see them.
    with monkeypatch.context() as without:
        without.delenv("AWS_ACCESS_KEY_ID")
        without.delenv("AWS_SECRET_ACCESS_KEY")
        complaint(open_blobs(s3_url), "read")
    assert open_blobs(s3_url).create("key", [b"x"])


@pytest.mark.usefixtures("s3_server")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_such_bucket(operation: str) -> None:
    url = "s3://actstore-tests-absent/run"
    # Each on its own: they find out in different ways.
    assert complaint(open_blobs(url), operation) == (
        f"{url}: the bucket does not exist; create it first, or correct the name"
    )


@pytest.mark.parametrize("operation", ["create", "read"])
def test_unreachable_server(s3_url: str, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard; nobody listens
    started = time.monotonic()
    message = complaint(open_blobs(s3_url), operation)
    assert time.monotonic() - started < 5
    verb = {"create": "written", "read": "read"}[operation]
    assert message.startswith(f"{s3_url}/key cannot be {verb}: the server is not reachable")
    assert "http://127.0.0.1:9" in message
