"""The memory that the body of a request takes once it is parsed."""

from typing import Final

from starlette.concurrency import run_in_threadpool

from actstore.query.server.memory.budget import Account, MemoryBudget

_NBYTES: Final = 10
"""For each byte of JSON: a number of few digits, its place in a list, and both once more as they are checked. Lists of
nothing take 25, but are refused at once.
"""
_SMALL: Final = 16 << 10
"""Bytes of bodies that are not worth counting."""


class ParsedBody:
    """Counted for its client while it comes, until the request is answered."""

    def __init__(self, budget: MemoryBudget, client: str) -> None:
        """
        Args:
            budget: of the process.
            client: that sends it.
        """
        self._budget = budget
        self._client = client
        self._account: Account | None = None
        self._nbytes = 0

    async def grow(self, nbytes: int) -> None:
        """Hold what it takes by now. The event loop does not wait.

        Args:
            nbytes: that have come, all in all.

        Raises:
            Problem: there is no room for it now, or never.
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
