"""Probes whether storage can be written and read, and keeps what another call has created."""

import contextlib
import uuid
from typing import Final

from actstore.errors import StorageError
from actstore.storage.blobs import Blobs
from actstore.storage.errors import BlobNotFoundError

_PROBES: Final = 3
"""Number of probes. One that fails is not enough, since another process may have removed its key in between."""


def probe(blobs: Blobs) -> bool:
    """Check, before any work, that blobs can be written and read here; nothing is left behind.

    Returns:
        Whether the storage itself refuses a second create of a key. Where it does not, two workers could both believe
        that they committed a segment, so only one process may commit.

    Raises:
        StorageError: storage cannot be written or read, or gives other bytes than were written.
    """
    blobs.probe_folders()
    for _ in range(_PROBES):
        try:
            if _is_refused(blobs):
                return not blobs.is_emulated
        except BlobNotFoundError:
            continue  # a process that sealed the store has cleaned up
    return False


def _is_refused(blobs: Blobs) -> bool:
    key = f"_actstore/probe/{uuid.uuid4().hex}"
    is_first = blobs.create(key, [b"probe"])
    try:
        _check_content(blobs, key, b"probe")
        is_second = blobs.create(key, [b"again"])
        _check_content(blobs, key, b"again" if is_second else b"probe")
    finally:
        with contextlib.suppress(StorageError):
            # A role that may create but not delete is a good choice; it leaves a few bytes here.
            blobs.delete(key)
    return is_first and not is_second


def _check_content(blobs: Blobs, key: str, written: bytes) -> None:
    read = bytes(blobs.read(key))
    if read != written:
        raise StorageError(
            f"{blobs.url}/{key} gives {read!r} where {written!r} was written; use storage that keeps what it is given"
        )
