"""What must hold of a store once a run has come to its end, whatever happened on the way."""

import actstore
from tests.conftest import S3Server
from tests.faults.store_bytes import differences, leftovers, store_bytes


def check_finished(url: str, expected: dict[str, str], server: S3Server | None = None) -> None:
    """Every object is there, with the bytes of an undisturbed run; nothing else is; verify agrees.

    Args:
        url: of the store.
        expected: what `store_bytes` says of the undisturbed one.
        server: where an S3 URL is, to look at it without actstore.
    """
    assert differences(store_bytes(url, server), expected) == []
    assert leftovers(url, server) == []
    assert actstore.open(url).is_complete
    verified = actstore.verify(url)
    assert verified.findings == ()
    assert verified.is_complete
