"""Fixtures with storage of every kind and with small local stores."""

import pytest

from actstore.storage.blobs import Blobs
from tests.storage.conftest import client, empty, local

__all__ = ["blobs", "client", "local"]


@pytest.fixture(params=["local", "memory", pytest.param("obstore", marks=pytest.mark.s3)])
def blobs(request: pytest.FixtureRequest) -> Blobs:
    """Empty storage: a folder, fsspec's memory, an S3 server through the client that is taken if both are installed.
    `tests.storage` holds each client to what the store needs of it, and `tests.store.test_store` takes each.
    """
    return empty(request.param, request)
