"""The memory of the batches of an order: which of it is used by whom."""

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
"""Of one batch, by hook."""


@dataclass(frozen=True)
class Lent:
    """Batches whose rows stay where they lie."""

    batches: list[dict[str, LentRows]]
    """Of each its rows, by hook."""


Made = Values | Batch | Lent
Begin = Callable[[Memory], Future[Made]]
"""Begins to make a batch in this memory."""


class Lease:
    """A batch that somebody waits for, or is sent. Its memory is left alone until the lease, and all that holds it, is
    gone.
    """

    def __init__(self, made: "Future[Made]", give_back: Callable[[], None] | None = None) -> None:
        self.made = made
        """The batch once it is made; it is not to be cancelled."""
        if give_back is not None:
            weakref.finalize(self, give_back).atexit = False

    def hold_for(self, array: Any) -> None:
        """Also until this object is gone: the system can have a part of it after the reply has ended."""
        weakref.finalize(array, _nothing, self).atexit = False


def _nothing(_lease: Lease) -> None:
    pass


class _Slot:
    """Memory of one batch that is kept, or being sent."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.is_kept = True
        self.readers: dict[str, tuple[int, Account]] = {}
        """By client: how many leases it has, and what counts them for its share."""
        self.holder: Account | None = None
        """The account of a reader that holds the memory, since the order does not keep the batch any more."""


class Slots:
    """Those of one order, each for one batch. What they take is in the account of the order."""

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
            budget: of the process.
            account: of the order, with one batch in it.
            nbytes: of a batch.
            n_kept: batches that are kept, at most.
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
        """A batch, for a client.

        Args:
            key: of the batch.
            client: whose share it counts for, once however often it is asked for.
            begin: begins to make it, if it is not there.

        Returns:
            The lease, and whether the batch was there, or being made.

        Raises:
            Problem: there is no memory for it now, or the client has too much in use.
        """
        counted = self._budget.account(client)
        is_counted = False
        try:
            while True:
                with self._lock:
                    found, is_shared = self._found(key), True
                    is_known = found is not None and client in found[1].readers
                    if found is None and is_counted and self._has_free():
                        found, is_shared = self._begun(key, begin), False
                    if found is not None and (is_known or is_counted):
                        self._kept.move_to_end(key)
                        made, slot = found
                        n, first = slot.readers.get(client, (0, counted))
                        slot.readers[client] = n + 1, first
                        if first is not counted:
                            counted.close()
                        return Lease(made, partial(self._given_back, slot, client)), is_shared
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
        """Begin with a batch that nobody waits for, if there is memory that nothing else is given up for."""
        with self._lock:
            if self._found(key) is None and (self._has_free() or self._has_grown()):
                self._begun(key, begin)

    def _add(self) -> None:
        with self._lock:
            self._free.append(self._new_memory())

    def _has_grown(self) -> bool:
        if not self._account.has_grown(self._nbytes):
            return False
        self._free.append(self._new_memory())
        return True

    def _found(self, key: Key) -> tuple[Future[Made], _Slot] | None:
        found = self._kept.get(key)
        if (
            found is not None
            and found[0].done()
            and (found[0].cancelled() or found[0].exception() is not None)
        ):
            self._drop(key)  # it is tried again
            return None
        return found

    def _has_free(self) -> bool:
        """See to a slot for one more batch, without giving up anything of others."""
        done = [key for key, (made, _) in self._kept.items() if made.done()]
        idle = [key for key in done if not self._kept[key][1].readers]
        if len(self._kept) >= self._n_kept and done:
            self._drop((idle or done).pop(0))
        if not self._free and len(self._kept) < self._n_kept and self._has_grown():
            return True
        if not self._free and idle:
            self._drop(idle[0])
        return bool(self._free)

    def _begun(self, key: Key, begin: Begin) -> tuple[Future[Made], _Slot]:
        slot = _Slot(self._free[-1])
        found = begin(slot.memory), slot
        self._free.pop()
        self._kept[key] = found
        return found

    def _drop(self, key: Key) -> None:
        _, slot = self._kept.pop(key)
        slot.is_kept = False
        self._settle(slot)

    def _given_back(self, slot: _Slot, client: str) -> None:
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
        """See who holds the memory of a slot of the order."""
        if slot.is_kept:
            return
        if not slot.readers:
            self._free.append(slot.memory)
            return
        # Whoever is slow to take it, and not the order, which has others to serve.
        self._move(slot, self._account)

    def _move(self, slot: _Slot, holder: Account) -> None:
        slot.holder = next(iter(slot.readers.values()))[1]
        holder.move(self._nbytes, slot.holder)

    def close(self) -> None:
        """Keep nothing any more, once nothing is being made. What is being sent is left to those who take it."""
        with self._lock:
            for key in list(self._kept):
                self._drop(key)
            self._free.clear()
