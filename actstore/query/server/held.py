"""Memory that replies take until they are sent."""

import contextlib
import threading
from collections.abc import Iterator

from actstore.query.problem import LATER, Problem


class Held:
    """Counts bytes that clients hold by being slow. Threads may share it."""

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: bytes of all replies together.
        """
        self._limit = limit
        self._n = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Count some, until the end of the block.

        Raises:
            Problem: it would be more than the limit, and not the only one.
        """
        with self._lock:
            if self._n and nbytes and self._n + nbytes > self._limit:
                raise Problem(
                    503,
                    "busy",
                    "other clients are still taking what they asked for; ask again",
                    LATER,
                )
            self._n += nbytes
        try:
            yield
        finally:
            with self._lock:
                self._n -= nbytes
