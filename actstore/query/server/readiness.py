"""Whether a server can do what it is for."""

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
"""For storage to answer; those who ask wait for 5 s or so."""
_KEPT_S: Final = 0.5
"""For which it stays true that all is well, or whoever asks without pause would have storage asked without pause."""
_LOG: Final = logging.getLogger(__name__)


class Readiness:
    """Looks at the stores in a thread of its own: those of requests can all be waiting for slow storage. There is one
    such thread at most, whose end whoever asks meanwhile waits for, too.
    """

    def __init__(self, catalog: Catalog, access: Access | None) -> None:
        """
        Args:
            catalog: of the stores.
            access: the tokens; None lets everybody in.
        """
        self._catalog = catalog
        self._access = access
        self._look: Future[None] | None = None
        self._was_well = -math.inf

    async def check(self) -> None:
        """See that somebody is let in, and that a store can be opened, or there is none yet below the root.

        Raises:
            Problem: it is not so, or that cannot be said in time.
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
            self._look.set_running_or_notify_cancel()  # whoever leaves does not end it for others
            threading.Thread(target=self._run, args=(self._look,), name="readiness", daemon=True).start()
        look = asyncio.wrap_future(self._look)
        await asyncio.wait([look], timeout=_PATIENCE_S)
        if not look.done():
            look.cancel()  # what comes of it is for others
            _LOG.error("the stores cannot be looked at within %g s", _PATIENCE_S)
            raise Problem(
                503, "busy", f"the storage of the stores did not answer within {_PATIENCE_S:g} s; ask again"
            )
        look.result()

    def _run(self, look: "Future[None]") -> None:
        try:
            self._check_stores()
        except BaseException as error:  # noqa: BLE001 - those who asked are told
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
