"""Leases: mutual exclusion between processes, on storage that has no locks."""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Final, Literal, Self

from actstore.errors import StorageError
from actstore.storage.blobs import BlobNotFoundError, Blobs
from actstore.store.format.document import Document
from actstore.store.locking.holder import Holder, now, this_process

LEASES: Final = "_actstore/leases"
RENEWAL_S: Final = 10.0
PATIENCE_S: Final = 45.0
"""Seconds without a renewal, by the clock of the waiting process, after which the holder of a lease is taken to be
dead.
"""
_POLL_S: Final = 0.5
_LOOKS: Final = 3
LOOK_S: Final = 0.5
"""Seconds before a second look at a lease that seems to be gone: some storage removes a file before replacing it."""


class LeaseRecord(Document):
    """The content of a lease in storage while it is held."""

    format: Literal[1] = 1
    holder: str
    """An id that differs for each lease that is taken."""
    n_renewals: int
    process: Holder = Holder()
    renewed: float = 0.0
    """Seconds since 1970, by the clock of the holder."""

    @classmethod
    def of(cls, holder: str, n_renewals: int) -> Self:
        """The record of this process, renewed now."""
        return cls(holder=holder, n_renewals=n_renewals, process=this_process(), renewed=now())


def is_held(blobs: Blobs, key: str, holder: str) -> bool:
    """Whether a lease exists and has this holder. If it is gone or cannot be parsed, it is read a second time.

    Raises:
        StorageError: storage failed, or the lease stays damaged.
    """
    for left in reversed(range(_LOOKS)):
        try:
            data = bytes(blobs.read(key))
        except BlobNotFoundError:
            if not left:
                return False
        else:
            try:
                return LeaseRecord.from_bytes(data, f"{blobs.url}/{key}").holder == holder
            except StorageError:
                if not left:
                    raise
        time.sleep(LOOK_S)
    raise AssertionError("the last look returns or raises")


class Lease:
    """A lease that this process holds; a thread of its own renews it."""

    def __init__(self, blobs: Blobs, key: str, holder: str) -> None:
        self._blobs = blobs
        self.key = key
        self.holder = holder
        self._is_lost = False
        self._renewed = time.monotonic()
        self._lock = threading.Lock()
        """Held while the lease is renewed or checked, since it can be absent during a renewal."""
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that this process still holds the lease.

        Raises:
            StorageError: this process was stopped for so long that another one took the lease.
        """
        with self._lock:
            # Also by the own clock: if storage cannot be reached, others will soon take this process to be dead.
            is_old = time.monotonic() - self._renewed > PATIENCE_S - RENEWAL_S
            self._is_lost = self._is_lost or (not is_old and not self._is_ours())
        if self._is_lost or is_old:
            raise StorageError(
                f"another process took over {self._blobs.url}/{self.key} while this one was stopped; run the same "
                "command again"
            )

    def release(self) -> None:
        """Release the lease. If storage fails, others wait as long as for a dead process."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(StorageError):
            if not self._is_lost and self._is_ours():
                self._blobs.delete(self.key)

    def _is_ours(self) -> bool:
        return is_held(self._blobs, self.key, self.holder)

    def _renew(self) -> None:
        n_renewals = 0
        while not self._released.wait(RENEWAL_S):
            n_renewals += 1
            try:
                with self._lock:
                    self._renew_once(n_renewals)
            except StorageError:
                continue  # the next renewal may succeed; if none does, `check` raises
            if self._is_lost:
                return

    def _renew_once(self, n_renewals: int) -> None:
        info = self._blobs.head(self.key)
        self._is_lost = not self._is_ours()
        if self._is_lost or info is None:
            return
        record = LeaseRecord.of(self.holder, n_renewals)
        # If it was taken over in between, nothing is replaced, and the next renewal notices.
        started = time.monotonic()
        if self._blobs.replace(self.key, [record.to_bytes()], expected=info.tag):
            self._renewed = started


@contextlib.contextmanager
def lease(blobs: Blobs, name: str) -> Iterator[Lease]:
    """Hold the lease of this name, waiting while another process holds it.

    A process that is stopped for longer than `PATIENCE_S` loses its lease, and `Lease.check` raises. It can be stopped
    again between that check and what follows, so leases make interference unlikely, not impossible. The rule that
    nothing is committed twice does not depend on them.

    Raises:
        StorageError: storage failed.
    """
    key = f"{LEASES}/{name}.json"
    holder = uuid.uuid4().hex
    seen, since = "", time.monotonic()
    while not blobs.create(key, record := [LeaseRecord.of(holder, 0).to_bytes()]):
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
