"""Turns on a store: any number of writers at a time, or one repair, across all machines."""

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from actstore.errors import BusyError, StorageError
from actstore.storage.blobs import Blobs
from actstore.store.locking import lease as leases
from actstore.store.locking.holder import is_alive, seconds_since
from actstore.store.locking.lease import LEASES, Lease, LeaseRecord, is_held, lease

_log = logging.getLogger("actstore")

_REPAIR: Final = "repair"
REPAIR_KEY: Final = f"{LEASES}/{_REPAIR}.json"
_WRITER: Final = "writer-"
_YIELD_S: Final = 3.0
"""A repair that sees a writer gives way within this many seconds."""
_POLL_S: Final = 0.5


@dataclass(frozen=True)
class Turn:
    """What a worker in another process needs to check that the writer's turn is not over."""

    key: str
    holder: str

    @classmethod
    def of(cls, held: Lease) -> "Turn":
        return cls(held.key, held.holder)

    def check(self, blobs: Blobs) -> None:
        """Check that the writer's lease still exists.

        Raises:
            BusyError: it is gone, since the store was deleted, or a repair took over after the writer had died or was
                stopped.
            StorageError: storage failed.
        """
        if not is_held(blobs, self.key, self.holder):
            raise BusyError(
                f"the lease of this run at {blobs.url}/{self.key} is gone: the store was deleted or repaired "
                "meanwhile, or this process was stopped; run the same command again"
            )


@contextlib.contextmanager
def writing(blobs: Blobs) -> Iterator[Lease]:
    """Take the turn of a writer; no repair begins while it lasts. Writers do not wait for each other.

    Raises:
        BusyError: a repair is running.
        StorageError: storage failed.
    """
    refuse_beside_repair(blobs)
    with lease(blobs, f"{_WRITER}{uuid.uuid4().hex}") as held:
        # A repair that began meanwhile either sees this lease and gives way, or looked earlier and stays.
        since = time.monotonic()
        while blobs.head(REPAIR_KEY) is not None:
            if time.monotonic() - since > _YIELD_S:
                refuse_beside_repair(blobs)
                break  # its process is dead, whether or not we may remove the lease
            time.sleep(_POLL_S)
        yield held


@contextlib.contextmanager
def repairing(blobs: Blobs) -> Iterator[Lease]:
    """Take the turn of a repair; nobody writes while it lasts, and there is no other repair.

    Leases of dead processes are removed: at once if the process was on this machine, otherwise after `PATIENCE_S`
    without a renewal.

    Raises:
        BusyError: a writer or another repair is running.
        StorageError: storage failed.
    """
    refuse_beside_repair(blobs)
    with lease(blobs, _REPAIR) as held:
        others = [key for key in _lease_keys(blobs) if key != REPAIR_KEY]
        writer = _living(blobs, others)
        if writer is not None:
            raise BusyError(
                f"{blobs.url} is being written to by {_described(writer)}; repair it once that run has ended, or stop "
                "the run first"
            )
        yield held


def refuse_beside_repair(blobs: Blobs) -> None:
    """Check that no repair is running.

    Raises:
        BusyError: a repair is running.
        StorageError: storage failed.
    """
    repair = _living(blobs, [REPAIR_KEY])
    if repair is not None:
        raise _busy_error(blobs, repair)


def refuse_beside_living_repair(blobs: Blobs) -> None:
    """Check that no repair is running, without waiting or writing. A repair that may be dead is left to `writing`.

    Raises:
        BusyError: a repair is running.
        StorageError: storage failed.
    """
    if blobs.head(REPAIR_KEY) is None:
        return
    repair = _record(blobs, REPAIR_KEY)
    alive = is_alive(repair.process)
    if alive or (alive is None and abs(seconds_since(repair.renewed)) < leases.PATIENCE_S):
        raise _busy_error(blobs, repair)


def _busy_error(blobs: Blobs, repair: LeaseRecord) -> BusyError:
    return BusyError(
        f"{blobs.url} is being repaired by {_described(repair)}; run the same command again once that has ended"
    )


def lease_tags(blobs: Blobs) -> dict[str, str]:
    """The tags of all leases by key, to find out later which of them were not renewed."""
    infos = {key: blobs.head(key) for key in _lease_keys(blobs)}
    return {key: info.tag for key, info in infos.items() if info is not None}


def remove_leases(blobs: Blobs, before: Mapping[str, str], seconds: float, *, is_sealed: bool) -> None:
    """Remove the leases of dead processes, as far as that can be told without waiting.

    Args:
        blobs: the storage of the store.
        before: an earlier result of `lease_tags`.
        seconds: the age of that result, in seconds.
        is_sealed: whether no segment is left that a lease could be for.
    """
    for key in _lease_keys(blobs):
        is_of_segment = not key.startswith((f"{LEASES}/{_WRITER}", REPAIR_KEY))
        info = blobs.head(key)
        is_old = info is not None and before.get(key) == info.tag and seconds > leases.PATIENCE_S
        if is_old or (is_of_segment and is_sealed) or is_alive(_record(blobs, key).process) is False:
            blobs.delete(key)


def _lease_keys(blobs: Blobs) -> list[str]:
    return [f"{LEASES}/{name}" for name in blobs.names(LEASES)]


def _living(blobs: Blobs, keys: Sequence[str]) -> LeaseRecord | None:
    """The first of these leases whose holder is alive; leases of dead holders are removed.

    If only time can tell, wait for a renewal for up to `PATIENCE_S`.
    """
    since = time.monotonic()
    seen: dict[str, str] = {}
    left = list(keys)
    while left:
        for key in tuple(left):
            info = blobs.head(key)
            record = _record(blobs, key)
            if info is None:
                left.remove(key)
                continue
            is_first = key not in seen
            alive = is_alive(record.process)
            is_fresh = seconds_since(record.renewed) < leases.PATIENCE_S
            if seen.setdefault(key, info.tag) != info.tag or (alive and is_fresh):
                return record
            if alive is False or time.monotonic() - since > leases.PATIENCE_S:
                _remove(blobs, key, info.tag)
                left.remove(key)
            elif is_first:
                _log.warning(
                    "%s/%s is held by %s; waiting up to %.0f s to see whether that still lives",
                    *(blobs.url, key, _described(record), leases.PATIENCE_S),
                )
        if left:
            time.sleep(_POLL_S)
    return None


def _remove(blobs: Blobs, key: str, tag: str) -> None:
    """Remove a lease, unless it was just renewed or storage refuses. A holder that finds its lease gone stops."""
    with contextlib.suppress(StorageError):
        if blobs.replace(key, [LeaseRecord(holder="", n_renewals=0).to_bytes()], expected=tag):
            blobs.delete(key)


def _record(blobs: Blobs, key: str) -> LeaseRecord:
    """The record of a lease; an empty one if it is gone or cannot be read."""
    try:
        return LeaseRecord.read_if_there(blobs, key) or LeaseRecord(holder="", n_renewals=0)
    except StorageError:
        return LeaseRecord(holder="", n_renewals=0)


def _described(record: LeaseRecord) -> str:
    age = f", last heard of {max(0.0, seconds_since(record.renewed)):.0f} s ago" if record.renewed else ""
    return f"{record.process}{age}"
