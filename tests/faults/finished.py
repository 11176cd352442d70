"""Checks a store whose run has ended, whatever happened on the way."""

import actstore
from tests.conftest import S3Server
from tests.faults.store_bytes import differences, leftovers, store_bytes


def check_finished(url: str, expected: dict[str, str], server: S3Server | None = None) -> None:
    """Check that a store has exactly the objects and bytes of an undisturbed run, and that verify agrees.

    Args:
        url: URL of the store.
        expected: `store_bytes` of the undisturbed store.
        server: server of an S3 URL, to read the store without actstore.
    """
    assert differences(store_bytes(url, server), expected) == []
    assert leftovers(url, server) == []
    assert actstore.open(url).is_complete
    verified = actstore.verify(url)
    assert verified.findings == ()
    assert verified.is_complete
