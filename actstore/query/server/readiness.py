"""Checks whether a server can answer requests for stores."""

import asyncio
import logging
import math
import threading
import time
from concurrent.futures import Future
from typing import Final

from actstore.errors import ActstoreError, StorageError
from actstore.query.problem import Problem
from actstore.query.server.admission.access import Access
from actstore.query.server.catalog.catalog import Catalog

_PATIENCE_S: Final = 3.0
"""Seconds for storage to answer; probes wait for some 5 s."""
_KEPT_S: Final = 0.5
"""Seconds for which a good result is kept, so that frequent probes do not become frequent requests to storage."""
_LOG: Final = logging.getLogger(__name__)


class Readiness:
    """Looks at the stores in a thread of its own, as all threads of requests may be waiting for slow storage. There is
    at most one such thread; probes that come meanwhile wait for its result, too.
    """

    def __init__(self, catalog: Catalog, access: Access | None) -> None:
        """
        Args:
            catalog: the stores.
            access: the tokens; None lets everybody in.
        """
        self._catalog = catalog
        self._access = access
        self._look: Future[None] | None = None
        self._was_well = -math.inf

    async def check(self) -> None:
        """Check that some token is valid, and that a store can be opened, or that there is none yet below the root.

        Raises:
            Problem: the server is not ready, or did not know in time.
        """
        if self._access is not None and not self._access.is_open:
            raise Problem(
                503,
                "busy",
                "nobody is let in, as the token file has no token now, or cannot be read; the log of the server says "
                "more",
            )
        if time.monotonic() - self._was_well < _KEPT_S:
            return
        if self._look is None or self._look.done():
            self._look = Future()
            self._look.set_running_or_notify_cancel()  # a probe that leaves does not cancel it for others
            threading.Thread(target=self._run, args=(self._look,), name="readiness", daemon=True).start()
        look = asyncio.wrap_future(self._look)
        await asyncio.wait([look], timeout=_PATIENCE_S)
        if not look.done():
            look.cancel()  # others may still wait for the result
            _LOG.error("the stores cannot be looked at within %g s", _PATIENCE_S)
            raise Problem(
                503, "busy", f"the storage of the stores did not answer within {_PATIENCE_S:g} s; ask again"
            )
        look.result()

    def _run(self, look: "Future[None]") -> None:
        try:
            self._check_stores()
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            look.set_exception(error)
        else:
            self._was_well = time.monotonic()
            look.set_result(None)

    def _check_stores(self) -> None:
        try:
            names = list(self._catalog.urls())
        except StorageError as error:
            _LOG.error("the stores cannot be listed: %s", error)
            raise _not_ready() from error
        for name in names:
            try:
                self._catalog.look(name)
            except ActstoreError as error:
                _LOG.error("%s cannot be read: %s", name, error)
            else:
                return
        if names:
            raise _not_ready()


def _not_ready() -> Problem:
    return Problem(503, "busy", "the stores cannot be read now; the log of the server says more")
