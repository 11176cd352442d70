"""What every request passes: its token, the limits, and the clock."""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from actstore.query.problem import LATER, Problem
from actstore.query.server.access import Access, Scope
from actstore.query.server.metrics import Metrics
from actstore.query.server.settings import Settings
from actstore.query.wire import PROBLEM, STORE

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Receive, Send], Awaitable[None]]

OPEN: Final = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
"""Paths that need no token: they say nothing of any store."""
STORE_URL: Final = "actstore.store.url"
STORE_ID: Final = "actstore.store.id"
"""Where the store that a request is about is told in its scope."""
_UNAUTHORIZED: Final = {"WWW-Authenticate": "Bearer"}
_LOG: Final = logging.getLogger(__name__)


class Gate:
    """An ASGI application around another one."""

    def __init__(
        self, application: Application, settings: Settings, access: Access | None, metrics: Metrics
    ) -> None:
        """
        Args:
            application: gets what is let through, with the `Scope` of the client in ``scope["actstore.scope"]``.
            settings: with the limits.
            access: the tokens; None lets everybody read everything.
            metrics: of all requests, also of those that are turned away.
        """
        self._application = application
        self._settings = settings
        self._access = access
        self._metrics = metrics
        self._n = 0
        self._by_client: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        passage = _Passage(send, scope, time.perf_counter())
        try:
            await self._let_through(scope, receive, passage)
        except Problem as problem:
            await passage.answer(problem)
        except Exception as failure:  # noqa: BLE001 - a bug becomes a reply, too
            error: BaseException = failure
            if passage.status is None:
                _LOG.exception("%s %s failed", scope["method"], scope["path"])
                await passage.answer(Problem.of(failure))
            else:
                # Too late for another status. The connection is closed before the announced length, which every client
                # notices.
                error = error.__cause__ or error  # Starlette says only that it is too late
                what = str(error) or type(error).__name__
                _LOG.error("%s %s was cut off: %s", scope["method"], scope["path"], what)
        finally:
            self._metrics.count(scope, passage.status, passage.nbytes, time.perf_counter() - passage.begun)

    async def _let_through(self, scope: Any, receive: Receive, passage: "_Passage") -> None:
        client = self._client(scope)
        scope["actstore.scope"] = client
        if scope["path"] in OPEN:
            # A server that is busy is alive: those who look after it must hear so.
            await self._application(scope, receive, passage)
            return
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > self._settings.max_request:
            raise self._too_large()
        if self._n >= self._settings.concurrency:
            raise Problem(503, "busy", "the server is busy with other requests; ask again in a moment", LATER)
        if self._by_client[client.client] >= self._settings.concurrency_per_client:
            raise Problem(
                429,
                "too-many",
                f"{self._settings.concurrency_per_client} requests of this client are under way; ask for less at once",
                LATER,
            )
        self._n += 1
        self._by_client[client.client] += 1
        task = asyncio.ensure_future(self._application(scope, self._counted(receive), passage))
        # Not before its threads have ended: who asks again and again for what takes long would have ever more of them.
        task.add_done_callback(lambda _: self._leave(client.client))
        await self._in_time(task, passage)

    def _leave(self, client: str) -> None:
        self._n -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]

    def _client(self, scope: Any) -> Scope:
        """
        Raises:
            Problem: a token is needed, and this is none.
        """
        address = scope["client"][0] if scope.get("client") else ""
        if self._access is None or scope["path"] in OPEN:
            return Scope(address)
        kind, _, token = _header(scope, b"authorization").partition(" ")
        found = self._access.scope(token.strip()) if kind.lower() == "bearer" else None
        if found is None:
            raise Problem(
                401, "token", "a valid token is needed; send it as 'Authorization: Bearer ...'", _UNAUTHORIZED
            )
        return found

    def _too_large(self) -> Problem:
        return Problem(
            413, "too-large", f"a request can have {self._settings.max_request} bytes; ask for less at once"
        )

    def _counted(self, receive: Receive) -> Receive:
        """The body of a request that does not say how long it is."""
        n_bytes = 0

        async def counted() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._settings.max_request:
                raise self._too_large()
            return message

        return counted

    async def _in_time(self, task: "asyncio.Future[None]", passage: "_Passage") -> None:
        """A reply must begin in time; how long it then takes is the client's affair."""
        loop = asyncio.get_running_loop()
        late = loop.create_future()
        clock = loop.call_later(self._settings.timeout_s, _tell, late)
        try:
            await asyncio.wait((task, late), return_when=asyncio.FIRST_COMPLETED)
            if passage.status is not None or task.done():
                await task
                return
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            clock.cancel()
            late.cancel()
        passage.is_over = True
        task.add_done_callback(_ignored)
        raise Problem(
            503,
            "busy",
            f"the reply did not begin within {self._settings.timeout_s:g} s; ask again, or for less",
            LATER,
        )


def _tell(late: "asyncio.Future[None]") -> None:
    if not late.done():
        late.set_result(None)


def _ignored(task: "asyncio.Future[None]") -> None:
    """What comes of a handler after its time."""
    if not task.cancelled() and task.exception() is not None:
        _LOG.warning("a request that took too long failed: %s", task.exception())


class _Passage:
    """Notes what is sent."""

    def __init__(self, send: Send, scope: Any, begun: float) -> None:
        self._send = send
        self._scope = scope
        self.begun = begun
        self.status: int | None = None
        self.nbytes = 0
        self.is_over = False
        """Whether another reply was sent in the place of the handler's."""

    async def __call__(self, message: Message) -> None:
        """To the client, unless it was answered otherwise."""
        if not self.is_over:
            await self._sent(message)

    async def _sent(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if STORE_ID in self._scope:
                message["headers"] = [
                    *message["headers"],
                    (STORE.lower().encode(), self._scope[STORE_ID].encode()),
                ]
        else:
            self.nbytes += len(message.get("body", b""))
        await self._send(message)

    async def answer(self, problem: Problem) -> None:
        """Send a problem as the whole reply."""
        body = json.dumps(problem.document).encode()
        headers = {"Content-Type": PROBLEM, "Content-Length": str(len(body)), **problem.headers}
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._sent({"type": "http.response.start", "status": problem.status, "headers": raw})
        await self._sent({"type": "http.response.body", "body": body})


def _header(scope: Any, name: bytes) -> str:
    return next((value for found, value in scope["headers"] if found == name), b"").decode("latin-1")
