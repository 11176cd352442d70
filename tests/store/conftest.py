"""Storage of every kind, and small stores on the local disk."""

import uuid
from pathlib import Path

import pytest

from actstore.store.blobs import Blobs, open_blobs
from actstore.store.local import LocalBlobs


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """Empty storage: a folder, fsspec's memory, an S3 server."""
    if request.param == "s3":
        return open_blobs(request.getfixturevalue("s3_url"))
    return open_blobs(
        f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(tmp_path / "store")
    )


@pytest.fixture
def local(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "store")
