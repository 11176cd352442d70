"""Fixtures with storage of every kind and with small local stores, as in the tests of storage."""

from tests.storage.conftest import blobs, client, local

__all__ = ["blobs", "client", "local"]
