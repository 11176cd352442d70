"""The memory budget of a process, from which all memory for clients is taken before it is allocated."""

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final

from actstore.query.problem import Problem
from actstore.query.server.memory.deferring import DeferringLock

_SHARES: Final = 2
"""A client may use one part in so many of the budget at once."""
_GOING_S: Final = 10.0
"""Seconds to wait until memory that is given up is free. An order whose storage hangs can take longer; nobody waits for
that.
"""
_LATEST_S: Final = 30
"""Seconds at most after which a client that found no room is told to ask again."""
_WEIGHT: Final = 0.2
"""Weight of the last reply in the mean time that memory is held."""


class MemoryBudget:
    """Bytes that a process may hold for its clients. Threads may share it.

    Memory is held by accounts. An account that can be given up is, while nobody uses it, when room is needed: first
    those of the client that needs it, then others, each time the least recently used first.
    """

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: bytes of all accounts together at most.
        """
        self.limit = limit
        self.share = limit // _SHARES
        """Bytes that one client may have in use at most, so that others get their part."""
        self._held = 0
        self._claimed: Counter[str] = Counter()
        self._spare: OrderedDict[Account, None] = OrderedDict()
        """Accounts that can be given up and are not used, the most recently used last."""
        self._going: dict[Account, None] = {}
        self._lock = DeferringLock()
        self._mean_s = 1.0

    @property
    def held(self) -> int:
        """Bytes that all accounts hold."""
        with self._lock:
            return self._held

    def check(self, nbytes: int, what: str, remedy: str) -> None:
        """
        Raises:
            Problem: the memory is more than a client may ever have.
        """
        if nbytes > self.share:
            raise Problem(
                413,
                "too-large",
                f"{what} {nbytes} bytes of memory, and a client may have {self.share} of the server's; {remedy}",
            )

    def account(self, client: str, give_up: Callable[[], None] | None = None) -> "Account":
        """Make an account that holds nothing, and is in use.

        Args:
            client: client whose share it counts in.
            give_up: called from a thread of its own when others need the memory and the account is not in use; closes
                the account once the memory is free. None if it cannot be given up.
        """
        return Account(self, client, give_up)

    def hold(self, client: str, nbytes: int) -> "Account":
        """Make an account that holds some bytes until it is closed.

        Raises:
            Problem: there is no memory now.
        """
        account = self.account(client)
        account.grow(nbytes, nbytes)
        return account

    def give_up_idle(self, seconds: float) -> None:
        """Give up the accounts that were not used for some time, though nobody needs the room."""
        latest = time.monotonic() - seconds
        with self._lock:
            idle = [account for account in self._spare if account.used < latest]
            for account in idle:
                self._go(account)
        for account in idle:
            threading.Thread(target=account.give_up, name="give-up", daemon=True).start()

    def _go(self, account: "Account") -> None:
        del self._spare[account]
        self._going[account] = None
        account.is_going = True

    def _grow(self, account: "Account", nbytes: int, claim: int, *, is_needed: bool) -> bool:
        deadline = time.monotonic() + _GOING_S
        while True:
            with self._lock:
                if claim and self._claimed[account.client] + claim > self.share:
                    if not is_needed:
                        return False
                    raise self._client_is_busy(account.client)
                if self._held + nbytes <= self.limit:
                    self._add(account, nbytes, claim)
                    return True
                if not is_needed:
                    return False
                victim = self._victim(account.client)
                if victim is not None:
                    self._go(victim)
                going = victim or next(reversed(self._going), None)
            if victim is not None:
                # In a thread of its own, as storage that hangs must not hold up this one.
                threading.Thread(target=victim.give_up, name="give-up", daemon=True).start()
            if going is None or not going.gone.wait(max(0.0, deadline - time.monotonic())):
                raise self._server_is_busy()

    def _victim(self, client: str) -> "Account | None":
        own = (account for account in self._spare if account.client == client)
        return next(own, next(iter(self._spare), None))

    def _add(self, account: "Account", nbytes: int, claim: int) -> None:
        if account.is_closed:
            return
        self._held += nbytes
        account.nbytes += nbytes
        account.claim += claim
        if account.n_uses:
            self._claim(account.client, claim)

    def _claim(self, client: str, nbytes: int) -> None:
        self._claimed[client] += nbytes
        if not self._claimed[client]:
            del self._claimed[client]

    def _use(self, account: "Account", client: str) -> bool:
        with self._lock:
            if account.is_going or account.is_closed:
                return False
            if not account.n_uses:
                if self._claimed[client] + account.claim > self.share:
                    raise self._client_is_busy(client)
                self._spare.pop(account, None)
                account.client = client
                self._claim(client, account.claim)
            account.n_uses += 1
            return True

    def _leave(self, account: "Account") -> None:
        account.n_uses -= 1
        if not account.n_uses and not account.is_closed:
            self._claim(account.client, -account.claim)
            if account.can_be_given_up:
                account.used = time.monotonic()
                self._spare[account] = None

    def _close(self, account: "Account") -> None:
        if account.is_closed:
            return
        account.is_closed = True
        self._held -= account.nbytes
        if account.n_uses:
            self._claim(account.client, -account.claim)
        self._spare.pop(account, None)
        self._going.pop(account, None)
        if not account.can_be_given_up and account.claim:
            self._mean_s += _WEIGHT * (time.monotonic() - account.begun - self._mean_s)
        account.gone.set()

    def _client_is_busy(self, client: str) -> Problem:
        return Problem(
            503,
            "busy",
            f"requests, replies and batches of this client that are under way hold {self._claimed[client]} bytes of "
            f"memory, and it may have {self.share}; take them first, or ask for less at once",
            self._retry_after(),
        )

    def _server_is_busy(self) -> Problem:
        return Problem(
            503,
            "busy",
            "the memory of the server is taken by what other clients are still taking; ask again",
            self._retry_after(),
        )

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(min(_LATEST_S, max(1, math.ceil(self._mean_s))))}


class Account:
    """An amount of memory that is held and given up as a whole."""

    def __init__(self, budget: MemoryBudget, client: str, give_up: Callable[[], None] | None) -> None:
        self._budget = budget
        self.client = client
        """The client that uses it, or used it last."""
        self._on_give_up = give_up
        self.nbytes = 0
        """Bytes that the account holds."""
        self.claim = 0
        """Bytes that count in the share of the client, while the account is in use."""
        self.n_uses = 1
        self.begun = self.used = time.monotonic()
        """Times at which the account was made, and at which its last use ended."""
        self.is_going = self.is_closed = False
        self.gone = threading.Event()

    @property
    def can_be_given_up(self) -> bool:
        """Whether it can be given up while nobody uses it."""
        return self._on_give_up is not None

    def give_up(self) -> None:
        """Have the owner of the account close it."""
        assert self._on_give_up is not None
        self._on_give_up()

    def grow(self, nbytes: int, claim: int = 0) -> None:
        """Hold more; unused accounts are given up for it.

        Args:
            nbytes: bytes of memory.
            claim: how many of them count in the share of the client while the account is in use.

        Raises:
            Problem: there is no memory now, or the client has too much in use.
        """
        self._budget._grow(self, nbytes, claim, is_needed=True)

    def has_grown(self, nbytes: int, claim: int = 0) -> bool:
        """Hold more, and return True, if there is room without giving up other accounts."""
        return self._budget._grow(self, nbytes, claim, is_needed=False)

    def shrink(self, nbytes: int, claim: int = 0) -> None:
        """Hold less. This method and those below never wait."""
        self._budget._lock.later(lambda: self._budget._add(self, -nbytes, -claim))

    def move(self, nbytes: int, other: "Account") -> None:
        """Move some of the memory to another account."""
        self.shrink(nbytes)
        self._budget._lock.later(lambda: self._budget._add(other, nbytes, 0))

    def use(self, client: str) -> bool:
        """Keep the account from being given up until `leave`; False if it is too late for that.

        Raises:
            Problem: the client has too much in use.
        """
        return self._budget._use(self, client)

    def leave(self) -> None:
        """End a use."""
        self._budget._lock.later(lambda: self._budget._leave(self))

    def close(self) -> None:
        """Hold nothing any more. Closing twice is allowed."""
        self._budget._lock.later(lambda: self._budget._close(self))
