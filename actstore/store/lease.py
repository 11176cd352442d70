"""Leases: one process at a time, on storage that has no locks. Only strict mode needs them."""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Final, Literal

from actstore.errors import StorageError
from actstore.store.blobs import Blobs
from actstore.store.document import Document

LEASES: Final = "_actstore/leases"
RENEWAL_S: Final = 10.0
PATIENCE_S: Final = 45.0
"""A lease that was not renewed for so long, by the clock of who waits, is of a process that is gone."""
_POLL_S: Final = 0.5


class LeaseRecord(Document):
    """What lies in storage while a lease is held."""

    format: Literal[1] = 1
    holder: str
    n_renewals: int


class Lease:
    """A lease that this process holds, renewed by a thread of its own."""

    def __init__(self, blobs: Blobs, key: str, holder: str) -> None:
        self._blobs = blobs
        self._key = key
        self._holder = holder
        self._is_lost = False
        self._renewed = time.monotonic()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See that the lease is still ours.

        Raises:
            StorageError: this process was stopped for so long that another one took it.
        """
        # By the own clock as well: who cannot reach storage is taken for gone by others before long.
        is_old = time.monotonic() - self._renewed > PATIENCE_S - RENEWAL_S
        if self._is_lost or is_old or not self._is_ours():
            raise StorageError(
                f"another process took over {self._blobs.url}/{self._key} while this one stood still; run the same "
                "command again"
            )

    def release(self) -> None:
        """Give it back. If storage does not let us, others wait for as long as for a process that is gone."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(StorageError):
            if not self._is_lost and self._is_ours():
                self._blobs.delete(self._key)

    def _is_ours(self) -> bool:
        record = LeaseRecord.read_if_there(self._blobs, self._key)
        return record is not None and record.holder == self._holder

    def _renew(self) -> None:
        n_renewals = 0
        while not self._released.wait(RENEWAL_S):
            n_renewals += 1
            try:
                info = self._blobs.head(self._key)
                if info is None or not self._is_ours():
                    self._is_lost = True
                    return
                record = LeaseRecord(holder=self._holder, n_renewals=n_renewals)
                # If it was taken over in between, nothing is replaced, and the next renewal sees it.
                asked = time.monotonic()
                if self._blobs.replace(self._key, [record.to_bytes()], expected=info.tag):
                    self._renewed = asked
            except StorageError:
                continue  # the next renewal may get through; if none does, `check` will tell


@contextlib.contextmanager
def lease(blobs: Blobs, name: str) -> Iterator[Lease]:
    """Hold the lease of this name; waits while another process holds it.

    A process that stands still for longer than `PATIENCE_S` loses its lease, and `Lease.check` tells it so. Between
    that check and what follows it can stand still again: leases make mixing unlikely, not impossible. That nothing is
    committed twice does not depend on them.

    Raises:
        StorageError: storage failed.
    """
    key = f"{LEASES}/{name}.json"
    holder = uuid.uuid4().hex
    record = [LeaseRecord(holder=holder, n_renewals=0).to_bytes()]
    seen, since = "", time.monotonic()
    while not blobs.create(key, record):
        info = blobs.head(key)
        if info is None:
            continue
        if info.tag != seen:
            seen, since = info.tag, time.monotonic()
        elif time.monotonic() - since > PATIENCE_S and blobs.replace(key, record, expected=seen):
            break
        time.sleep(_POLL_S)
    held = Lease(blobs, key, holder)
    try:
        yield held
    finally:
        held.release()
