"""What every request passes: the check of its token, the limits, and the timeout."""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from actstore.query.problem import LATER, Problem
from actstore.query.server.admission.access import Access, Scope
from actstore.query.server.admission.hosts import Hosts
from actstore.query.server.connections.addresses import UNIX, Proxies, address_text, counted_as
from actstore.query.server.connections.body_writer import BODY
from actstore.query.server.connections.connection import SPARE
from actstore.query.server.memory.budget import MemoryBudget
from actstore.query.server.memory.parsed_body import ParsedBody
from actstore.query.server.monitoring.access_log import AccessLog
from actstore.query.server.monitoring.metrics import Metrics
from actstore.query.server.settings import Settings
from actstore.query.wire import CONTENTS, PROBLEM, STORE

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Receive, Send], Awaitable[None]]

HEALTH: Final = frozenset({"/healthz", "/readyz"})
OPEN: Final = HEALTH | {"/", "/docs", "/openapi.json"}
_OPEN_FOLDER: Final = "/docs/"
"""Paths that need no token: they reveal nothing about stores that the client may not read."""
STORE_URL: Final = "actstore.store.url"
STORE_ID: Final = "actstore.store.id"
STORE_VERSION: Final = "actstore.store.version"
"""Keys of the ASGI scope for the URL, the id and the version of the store that a request is about."""
_NO_SNIFFING: Final = (b"x-content-type-options", b"nosniff")
"""A browser must not take stored text for a page."""
_OWN_SITE: Final = (b"cross-origin-resource-policy", b"same-origin")
"""A page of another site must not load anything from here."""
_PAGES: Final = frozenset({"/", "/docs"})
_HEADERS: Final = ((STORE, STORE_ID), (CONTENTS, STORE_VERSION))
SCOPE: Final = "actstore.scope"
"""Key of the ASGI scope for the `Scope` of the client."""
ADDRESS: Final = "actstore.address"
"""Key of the ASGI scope for the address of the client."""
_SCHEMES: Final = ("http", "https")
_HANG_UP: Final = {**LATER, "Connection": "close"}
_UNAUTHORIZED: Final = {"WWW-Authenticate": "Bearer"}
_LOG: Final = logging.getLogger(__name__)


class Gate:
    """An ASGI application that checks requests before it hands them to another application."""

    def __init__(
        self,
        application: Application,
        settings: Settings,
        access: Access | None,
        metrics: Metrics,
        budget: MemoryBudget,
        log: AccessLog | None,
    ) -> None:
        """
        Args:
            application: handles the requests that pass, with the `Scope` of the client in ``scope[SCOPE]``.
            settings: settings with the limits.
            access: the tokens; None lets everybody read everything.
            metrics: counters of all requests, also of those that are refused.
            budget: memory in which parsed bodies are counted.
            log: log of all requests, also of those that are refused; None if there is none.
        """
        self._application = application
        self._settings = settings
        self._access = access
        self._metrics = metrics
        self._proxies = Proxies(settings.forwarded_allow_ips)
        self._hosts = Hosts(settings.allowed_hosts) if access is None else None
        self._budget = budget
        self._log = log
        self._n = 0
        self._n_body_bytes = 0
        self._by_client: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Implements the call of an ASGI application."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        self._note_client(scope)
        passage = _Passage(send, scope, time.perf_counter())
        try:
            await self._let_through(scope, receive, passage)
        except Problem as problem:
            await passage.answer(problem)
        except Exception as failure:  # noqa: BLE001 - a bug becomes a reply, too
            if passage.status is None:
                _LOG.exception("%s %s failed", scope["method"], scope["path"])
                await passage.answer(Problem.of(failure))
            else:
                # Too late for another status. The connection is closed before the announced length, which every client
                # notices.
                _LOG.error("%s %s was cut off: %s", scope["method"], scope["path"], _reason(failure))
            _drop_tracebacks(failure)
        finally:
            seconds = time.perf_counter() - passage.begun
            nbytes = passage.nbytes + (scope[BODY].nbytes if BODY in scope else 0)
            client = scope.get(SCOPE) if self._access is not None else None
            name = client.client if client is not None and client.globs else None
            self._metrics.count(scope, name, passage.status, nbytes, seconds)
            if self._log is not None:
                store = scope.get("path_params", {}).get("store") if STORE_ID in scope else None
                self._log.write(scope, name or scope[ADDRESS], store, passage.status, nbytes, seconds)

    def _note_client(self, scope: Any) -> None:
        """Note the address and scheme of the client: those of the connection, or what a trusted proxy says."""
        peer = scope["client"][0] if scope.get("client") else UNIX
        scope[ADDRESS] = address_text(peer)
        if self._proxies.trusts(peer):
            scope[ADDRESS] = self._proxies.client(address_text(peer), _headers(scope, b"x-forwarded-for"))
            schemes = _headers(scope, b"x-forwarded-proto")
            if schemes and schemes[-1].strip() in _SCHEMES:
                scope["scheme"] = schemes[-1].strip()

    async def _let_through(self, scope: Any, receive: Receive, passage: "_Passage") -> None:
        # No page can reach a Unix socket, and health reveals nothing: monitoring may not know the names of the server.
        if self._hosts is not None and scope[ADDRESS] != UNIX and scope["path"] not in HEALTH:
            self._hosts.check(_header(scope, b"host"))
        if self._hosts is not None and _is_of_another_site(scope):
            raise Problem(
                403,
                "cross-site",
                "a page of another site asked for this, and this server has no tokens; type the address instead",
            )
        if scope.get(SPARE) and scope["path"] not in HEALTH:
            raise Problem(503, "busy", "the server has no connection to spare; ask again", _HANG_UP)
        client = self._client(scope)
        scope[SCOPE] = client
        if scope["path"] in HEALTH:
            # A busy server is alive, and monitoring must be able to see that.
            await self._application(scope, receive, passage)
            return
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > self._settings.max_request:
            raise _too_large(self._settings.max_request)
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
        held = ParsedBody(self._budget, client.client)
        body = _Body(receive, self._settings.max_request, self._take_body, held)
        task = asyncio.ensure_future(self._application(scope, body, passage))
        # Not before its threads have ended: a client that repeats slow requests would have ever more of them.
        task.add_done_callback(lambda _: self._leave(client.client, body))
        await self._wait_for_reply(task, passage)

    def _take_body(self, nbytes: int) -> None:
        """
        Raises:
            Problem: there is no room for more of the body.
        """
        if self._n_body_bytes + nbytes > self._settings.max_bodies:
            raise Problem(503, "busy", "other clients are sending long requests; ask again", LATER)
        self._n_body_bytes += nbytes

    def _leave(self, client: str, body: "_Body") -> None:
        body.held.close()
        self._n_body_bytes -= body.nbytes
        self._n -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]

    def _client(self, scope: Any) -> Scope:
        """
        Raises:
            Problem: a valid token is needed, and there is none.
        """
        if self._access is None:
            return Scope(counted_as(scope[ADDRESS]))
        kind, _, token = _header(scope, b"authorization").partition(" ")
        is_open, scope_of_token = _is_open(scope["path"]), None
        try:
            scope_of_token = self._access.scope(token.strip()) if kind.lower() == "bearer" else None
        except Problem:
            if not is_open:
                raise
        if scope_of_token is None and is_open:
            return Scope(counted_as(scope[ADDRESS]), ())
        if scope_of_token is None:
            raise Problem(
                401, "token", "a valid token is needed; send it as 'Authorization: Bearer ...'", _UNAUTHORIZED
            )
        return scope_of_token

    async def _wait_for_reply(self, task: "asyncio.Future[None]", passage: "_Passage") -> None:
        """Wait until the reply begins, within the timeout; how long it then takes depends on the client."""
        loop = asyncio.get_running_loop()
        late = loop.create_future()
        clock = loop.call_later(self._settings.timeout_s, _set_result, late)
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
        passage.end()
        task.add_done_callback(_log_late_failure)
        raise Problem(
            503,
            "busy",
            f"the reply did not begin within {self._settings.timeout_s:g} s; ask again, or for less",
            LATER,
        )


class _Body:
    """The body of a request, counted while it arrives, as it need not announce its length."""

    def __init__(self, receive: Receive, limit: int, take: Callable[[int], None], held: ParsedBody) -> None:
        """
        Args:
            receive: ASGI function of the connection.
            limit: bytes of this body at most.
            take: called with each number of bytes that are kept in memory.
            held: memory for the body once it is parsed.
        """
        self._receive = receive
        self._limit = limit
        self._take = take
        self.held = held
        self.nbytes = 0

    async def __call__(self) -> Message:
        """Implements ASGI's receive.

        Raises:
            Problem: the body is too long, or there is no room for it.
        """
        message = await self._receive()
        nbytes = len(message.get("body", b""))
        if self.nbytes + nbytes > self._limit:
            raise _too_large(self._limit)
        self._take(nbytes)
        self.nbytes += nbytes
        await self.held.grow(self.nbytes)
        return message


def _too_large(limit: int) -> Problem:
    return Problem(413, "too-large", f"a request can have {limit} bytes; ask for less at once")


def _set_result(late: "asyncio.Future[None]") -> None:
    if not late.done():
        late.set_result(None)


def _log_late_failure(task: "asyncio.Future[None]") -> None:
    """Log the failure of a handler that ended after its timeout."""
    if not task.cancelled() and task.exception() is not None:
        _LOG.warning("a request that took too long failed: %s", task.exception())


class _Passage:
    """Sends a reply, and notes its status and size."""

    def __init__(self, send: Send, scope: Any, begun: float) -> None:
        self._send = send
        self._scope = scope
        self.begun = begun
        self.status: int | None = None
        self.nbytes = 0
        self._is_over = False
        """Whether another reply was sent instead of the handler's."""

    def end(self) -> None:
        """Discard the rest of the handler's reply, however it is sent."""
        self._is_over = True
        if BODY in self._scope:
            self._scope[BODY].is_over = True

    async def __call__(self, message: Message) -> None:
        """Send a message to the client, unless another reply was sent instead."""
        if not self._is_over:
            await self._send_on(message)

    async def _send_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [
                (name.lower().encode(), self._scope[field].encode())
                for name, field in _HEADERS
                if field in self._scope
            ]
            message["headers"] = [*message["headers"], _NO_SNIFFING, _OWN_SITE, *own]
        else:
            self.nbytes += len(message.get("body", b""))
        await self._send(message)

    async def answer(self, problem: Problem) -> None:
        """Send a problem as the whole reply."""
        body = json.dumps(problem.document).encode()
        headers = {"Content-Type": PROBLEM, "Content-Length": str(len(body)), **problem.headers}
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send_on({"type": "http.response.start", "status": problem.status, "headers": raw})
        await self._send_on({"type": "http.response.body", "body": body})


def _is_of_another_site(scope: Any) -> bool:
    """Whether a page of another site sent the request; following a link to a page of this server is allowed."""
    if _header(scope, b"sec-fetch-site") != "cross-site":
        return False
    is_visit = (
        _header(scope, b"sec-fetch-mode") == "navigate" and _header(scope, b"sec-fetch-dest") == "document"
    )
    return not (is_visit and scope["path"] in _PAGES and scope["method"] in ("GET", "HEAD"))


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(_OPEN_FOLDER)


def _headers(scope: Any, name: bytes) -> list[str]:
    return [value.decode("latin-1") for header, value in scope["headers"] if header == name]


def _reason(failure: Exception) -> str:
    """Why a reply was cut off. Starlette only says that it is too late for another reply."""
    reason = failure.__cause__ or failure
    return str(reason) or type(reason).__name__


def _drop_tracebacks(failure: BaseException) -> None:
    """Free the frames that an error came through, and what they hold, such as the rest of a reply. An error and a frame
    that holds it keep each other alive until the garbage collector runs.
    """
    left: list[BaseException | None] = [failure]
    known: set[int] = set()  # errors can name each other
    while left:
        error = left.pop()
        if error is not None and id(error) not in known:
            known.add(id(error))
            error.__traceback__ = None
            left += [error.__cause__, error.__context__]


def _header(scope: Any, name: bytes) -> str:
    return next((value for header, value in scope["headers"] if header == name), b"").decode("latin-1")
