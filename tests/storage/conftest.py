"""Storage of every kind, and small stores on the local disk."""

import uuid
from pathlib import Path

import pytest

from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs

KINDS = ["local", "memory", *(pytest.param(kind, marks=pytest.mark.s3) for kind in ("s3fs", "obstore"))]


@pytest.fixture(params=KINDS)
def blobs(request: pytest.FixtureRequest) -> Blobs:
    """Empty storage: a folder, fsspec's memory, an S3 server through each client."""
    return empty(request.param, request)


def empty(kind: str, request: pytest.FixtureRequest) -> Blobs:
    """Empty storage of one kind, for the test that requests it."""
    if kind in ("s3fs", "obstore"):
        request.getfixturevalue("monkeypatch").setenv("ACTSTORE_S3", kind)
        return open_blobs(request.getfixturevalue("s3_url"))
    if kind == "memory":
        return open_blobs(f"memory://{uuid.uuid4().hex}")
    return open_blobs(str(request.getfixturevalue("tmp_path") / "store"))


@pytest.fixture(params=["s3fs", "obstore"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each client for S3, chosen by the environment."""
    name: str = request.param
    monkeypatch.setenv("ACTSTORE_S3", name)
    return name


@pytest.fixture
def local(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "store")
