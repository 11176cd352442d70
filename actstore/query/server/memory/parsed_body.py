"""Counts the memory that the body of a request takes once it is parsed."""

from typing import Final

from starlette.concurrency import run_in_threadpool

from actstore.query.server.memory.budget import Account, MemoryBudget

_NBYTES: Final = 10
"""Bytes of memory for each byte of JSON: a number of few digits, its place in a list, and both once more as they are
checked. Empty lists take 25, but are refused at once.
"""
_SMALL: Final = 16 << 10
"""Bytes up to which a body is not counted."""


class ParsedBody:
    """Memory of one body, counted for its client while it arrives, until the request is answered."""

    def __init__(self, budget: MemoryBudget, client: str) -> None:
        """
        Args:
            budget: memory budget of the process.
            client: client that sends the body.
        """
        self._budget = budget
        self._client = client
        self._account: Account | None = None
        self._nbytes = 0

    async def grow(self, nbytes: int) -> None:
        """Hold the memory that the body takes by now. The event loop does not wait.

        Args:
            nbytes: bytes that have arrived in all.

        Raises:
            Problem: there is no memory for it, now or ever.
        """
        if nbytes <= _SMALL:
            return
        needed = _NBYTES * nbytes
        self._budget.check(needed, "this request takes up to", "send a shorter one")
        if self._account is None:
            self._account = self._budget.account(self._client)
        more, self._nbytes = needed - self._nbytes, needed
        if not self._account.has_grown(more, more):
            await run_in_threadpool(self._account.grow, more, more)

    def close(self) -> None:
        """Hold nothing any more."""
        if self._account is not None:
            self._account.close()
