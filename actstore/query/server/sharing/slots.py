"""The memory of the batches of an order, and who uses which of it."""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from actstore.loader.batches.batch import Batch, Values
from actstore.loader.batches.lent_rows import LentRows
from actstore.loader.rows.buffers import Buffers
from actstore.query.server.memory.budget import Account, MemoryBudget
from actstore.query.server.memory.deferring import DeferringLock

Key = tuple[int, int]
"""Epoch and number of a batch."""
Memory = dict[str, Buffers]
"""Buffers of one batch, by hook."""


@dataclass(frozen=True)
class Lent:
    """Batches whose rows are sent from where they lie."""

    batches: list[dict[str, LentRows]]
    """Rows of each batch, by hook."""


Made = Values | Batch | Lent
Begin = Callable[[Memory], Future[Made]]
"""Begins to make a batch in the given memory."""


class Lease:
    """A batch that a client waits for, or is sent. Its memory is not reused until the lease, and all that holds it, is
    freed.
    """

    def __init__(self, made: "Future[Made]", give_back: Callable[[], None] | None = None) -> None:
        self.made = made
        """The batch once it is made. It must not be cancelled."""
        if give_back is not None:
            weakref.finalize(self, give_back).atexit = False

    def hold_for(self, array: Any) -> None:
        """Keep the lease until an array is freed, too: the system may have a part of it after the reply has ended."""
        weakref.finalize(array, _nothing, self).atexit = False


def _nothing(_lease: Lease) -> None:
    pass


class _Slot:
    """Memory of one batch that is kept, or being sent."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.is_kept = True
        self.readers: dict[str, tuple[int, Account]] = {}
        """Number of leases of each client, and the account that counts them in its share."""
        self.holder: Account | None = None
        """Account of a reader that holds the memory, once the order does not keep the batch any more."""


class Slots:
    """The slots of one order, each for one batch. The account of the order holds their memory."""

    def __init__(
        self,
        budget: MemoryBudget,
        account: Account,
        nbytes: int,
        n_kept: int,
        new_memory: Callable[[], Memory],
    ) -> None:
        """
        Args:
            budget: memory budget of the process.
            account: account of the order, with one batch in it.
            nbytes: bytes of a batch.
            n_kept: batches that are kept at most.
            new_memory: makes the buffers of a slot, which take memory when they are used.
        """
        self._budget = budget
        self._account = account
        self._nbytes = nbytes
        self._n_kept = n_kept
        self._new_memory = new_memory
        self._kept: OrderedDict[Key, tuple[Future[Made], _Slot]] = OrderedDict()
        self._free = [new_memory()]
        self._lock = DeferringLock()

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def lease(self, key: Key, client: str, begin: Begin) -> tuple[Lease, bool]:
        """Lease a batch to a client.

        Args:
            key: key of the batch.
            client: client in whose share the batch counts, once for any number of leases.
            begin: begins to make the batch, if it is not kept.

        Returns:
            The lease, and whether the batch was made, or being made, already.

        Raises:
            Problem: there is no memory now, or the client has too much in use.
        """
        counted = self._budget.account(client)
        is_counted = False
        try:
            while True:
                with self._lock:
                    kept, is_shared = self._kept_batch(key), True
                    is_known = kept is not None and client in kept[1].readers
                    if kept is None and is_counted and self._has_free():
                        kept, is_shared = self._begin(key, begin), False
                    if kept is not None and (is_known or is_counted):
                        self._kept.move_to_end(key)
                        made, slot = kept
                        n, first = slot.readers.get(client, (0, counted))
                        slot.readers[client] = n + 1, first
                        if first is not counted:
                            counted.close()
                        return Lease(made, partial(self._on_lease_end, slot, client)), is_shared
                if not is_counted:
                    counted.grow(0, self._nbytes)
                    is_counted = True
                else:
                    self._account.grow(self._nbytes)
                    self._add()
        except BaseException:
            counted.close()
            raise

    def make_ahead(self, key: Key, begin: Begin) -> None:
        """Begin with a batch that no client waits for, if there is memory without giving up other memory."""
        with self._lock:
            if self._kept_batch(key) is None and (self._has_free() or self._has_grown()):
                self._begin(key, begin)

    def _add(self) -> None:
        with self._lock:
            self._free.append(self._new_memory())

    def _has_grown(self) -> bool:
        if not self._account.has_grown(self._nbytes):
            return False
        self._free.append(self._new_memory())
        return True

    def _kept_batch(self, key: Key) -> tuple[Future[Made], _Slot] | None:
        kept = self._kept.get(key)
        if kept is not None and kept[0].done() and (kept[0].cancelled() or kept[0].exception() is not None):
            self._drop(key)  # it failed; the next request tries again
            return None
        return kept

    def _has_free(self) -> bool:
        """Find a slot for one more batch, without giving up memory of others."""
        done = [key for key, (made, _) in self._kept.items() if made.done()]
        idle = [key for key in done if not self._kept[key][1].readers]
        if len(self._kept) >= self._n_kept and done:
            self._drop((idle or done).pop(0))
        if not self._free and len(self._kept) < self._n_kept and self._has_grown():
            return True
        if not self._free and idle:
            self._drop(idle[0])
        return bool(self._free)

    def _begin(self, key: Key, begin: Begin) -> tuple[Future[Made], _Slot]:
        slot = _Slot(self._free[-1])
        kept = begin(slot.memory), slot
        self._free.pop()
        self._kept[key] = kept
        return kept

    def _drop(self, key: Key) -> None:
        _, slot = self._kept.pop(key)
        slot.is_kept = False
        self._settle(slot)

    def _on_lease_end(self, slot: _Slot, client: str) -> None:
        self._lock.later(lambda: self._give_back(slot, client))

    def _give_back(self, slot: _Slot, client: str) -> None:
        n, counted = slot.readers[client]
        if n > 1:
            slot.readers[client] = n - 1, counted
            return
        del slot.readers[client]
        if slot.holder is counted and slot.readers:
            self._move(slot, counted)
        counted.close()
        if slot.holder is None:
            self._settle(slot)

    def _settle(self, slot: _Slot) -> None:
        """Decide who holds the memory of a slot that the order does not keep any more."""
        if slot.is_kept:
            return
        if not slot.readers:
            self._free.append(slot.memory)
            return
        # A slow reader holds it, and not the order, which has others to serve.
        self._move(slot, self._account)

    def _move(self, slot: _Slot, holder: Account) -> None:
        slot.holder = next(iter(slot.readers.values()))[1]
        holder.move(self._nbytes, slot.holder)

    def close(self) -> None:
        """Keep no batches any more, once none is being made. Those that are being sent stay with their readers."""
        with self._lock:
            for key in list(self._kept):
                self._drop(key)
            self._free.clear()
