"""Stores of every kind, on disk and on S3, and servers of them."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from tests.conftest import S3Server
from tests.query.running import Running, running
from tests.query.stores import write_all


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stores, by the names in `tests.query.stores`."""
    folder = tmp_path_factory.mktemp("stores")
    write_all(lambda name: LocalBlobs(folder / name))
    return folder


@pytest.fixture(scope="session")
def s3_stores(s3_server: S3Server) -> str:
    """The same stores on S3."""
    url = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"
    write_all(lambda name: open_blobs(f"{url}/{name}"))
    return url


@pytest.fixture(scope="session")
def server(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the stores on disk, without tokens."""
    with running(tmp_path_factory.mktemp("server"), "--root", str(stores)) as served:
        yield served


@pytest.fixture(scope="session")
def s3_served(s3_stores: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the stores on S3."""
    with running(tmp_path_factory.mktemp("s3-server"), "--root", s3_stores) as served:
        yield served
