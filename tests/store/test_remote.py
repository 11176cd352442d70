"""Blobs on S3: one PUT whatever the size, and one sentence for each thing that can be wrong."""

from collections.abc import Callable

import numpy as np
import pytest

from actstore.errors import StorageError
from actstore.store.blobs import BlobNotFoundError, Blobs, check_writable, open_blobs
from tests.conftest import S3Server

OPERATIONS: dict[str, Callable[[Blobs], object]] = {
    "create": lambda blobs: blobs.create("key", [b"x"]),
    "read": lambda blobs: blobs.read("key"),
    "size": lambda blobs: blobs.size("key"),
    "names": lambda blobs: blobs.names("key"),
    "delete": lambda blobs: blobs.delete("key"),
}


def attempt(url: str, operation: str) -> str:
    """What an operation on this storage complains of."""
    blobs = open_blobs(url)
    with pytest.raises(StorageError) as caught:
        OPERATIONS[operation](blobs)
    assert not isinstance(caught.value, BlobNotFoundError)
    return str(caught.value)


def test_large_blob_is_one_put(s3_url: str, s3_server: S3Server) -> None:
    # s3fs would cut everything from 100 MiB on into parts.
    body = np.random.default_rng(0).integers(0, 256, 101 << 20, dtype=np.uint8)
    blobs = open_blobs(s3_url)
    assert blobs.create("large", [body, b"end"])
    _, key = s3_url.removeprefix("s3://").split("/", 1)
    found = s3_server.client().head_object(Bucket=s3_server.bucket, Key=f"{key}/large")
    assert found["ContentLength"] == body.nbytes + 3
    assert "-" not in found["ETag"]
    assert bytes(blobs.read("large", body.nbytes - 5, 8)) == body[-5:].tobytes() + b"end"


def test_credentials_that_may_only_read(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_blobs(s3_url).create("there", [b"there"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    blobs = open_blobs(s3_url)
    assert bytes(blobs.read("there")) == b"there"
    assert blobs.names("") == ["there"]
    with pytest.raises(StorageError, match="cannot be written: access denied to these credentials"):
        check_writable(blobs)
    with pytest.raises(StorageError, match="there cannot be deleted: access denied to these credentials"):
        blobs.delete("there")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_wrong_secret(s3_url: str, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "access denied to these credentials" in attempt(s3_url, operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = attempt(s3_url, operation)
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
        attempt(s3_url, "read")
    assert open_blobs(s3_url).create("key", [b"x"])


@pytest.mark.usefixtures("s3_server")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_such_bucket(operation: str) -> None:
    url = "s3://actstore-tests-absent/run"
    assert attempt(url, operation) == (
        f"{url}: the bucket does not exist; create it first, or correct the name"
    )


def test_unreachable_server(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard; nobody listens
    message = attempt(s3_url, "create")
    assert message.startswith(f"{s3_url}/key cannot be written: the server is not reachable")
    assert "http://127.0.0.1:9" in message
