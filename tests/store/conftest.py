"""Storage of every kind, and small stores on the local disk, as the tests of storage have them."""

from tests.storage.conftest import blobs, client, local

__all__ = ["blobs", "client", "local"]
