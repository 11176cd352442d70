"""Replies of many bytes: ranges, conditions, and sending piece by piece."""

import asyncio
import hashlib
import itertools
import re
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any, Final

import numpy as np
from fastapi import Request
from starlette.responses import Response

from actstore.query.problem import Problem
from actstore.query.server.connections.body_writer import BODY, BodyWriter
from actstore.query.server.connections.disconnect import Receive, wait_for_disconnect
from actstore.query.server.connections.socket_writes import SLOWEST, Vectors, vectors_of
from actstore.query.server.memory.budget import Account
from actstore.query.server.sending.body import Body, InMemory, Piece, Scattered
from actstore.query.server.state import scope_of, state_of
from actstore.query.wire import JSON

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_SENT_NBYTES: Final = 2 << 20
"""Bytes that are given to the socket at once: what a slow client makes the server hold."""
_REST_NBYTES: Final = 64
"""Bytes of the end of a body that are sent only after its memory is given back."""
_RANGE: Final = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")


def etag(*parts: str) -> str:
    """A strong ETag over all that decides the bytes of a reply."""
    return '"' + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32] + '"'


def stream(
    request: Request,
    body: Body,
    media_type: str,
    *,
    tag: str | None,
    headers: Mapping[str, str] | None = None,
    held: Account | None = None,
) -> Response:
    """The reply to a request: all of the body, a range of it for a GET, or nothing if the client has it already.

    The first piece is made here, so that an error gets its own status.

    Args:
        request: request to answer.
        body: the whole body.
        media_type: media type of the body.
        tag: ETag, different for each body; None where it is not known.
        headers: further headers.
        held: memory for the body; None if it is not counted yet.

    Raises:
        NotCommittedError: a row is not committed.
        Problem: the range is not within the body, the reply is too large, or there is no memory for it now.
        StorageError: the first piece cannot be read.
    """
    reply = None
    try:
        reply = _part_of(request, body, media_type, tag, headers, held)
        return reply
    finally:
        if held is not None and not isinstance(reply, _Pieces):
            held.close()


def _part_of(
    request: Request,
    body: Body,
    media_type: str,
    tag: str | None,
    headers: Mapping[str, str] | None,
    held: Account | None,
) -> Response:
    reply_headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, no-cache", **(headers or {})}
    if tag is not None:
        reply_headers["ETag"] = tag
        if _is_known(request.headers.get("If-None-Match"), tag):
            return Response(status_code=304, headers=reply_headers)
    start, stop, status = 0, body.nbytes, 200
    wanted = _RANGE.fullmatch(request.headers.get("Range", ""))
    if wanted and request.method == "GET" and request.headers.get("If-Range") in (None, tag):
        # Anything but one range of bytes is answered with all, as RFC 9110 allows; and no other method has ranges.
        start, stop = _range(wanted, body.nbytes)
        reply_headers["Content-Range"] = f"bytes {start}-{stop - 1}/{body.nbytes}"
        status = 206
    state = state_of(request)
    check_size(stop - start, state.settings.max_reply)
    reply_headers["Content-Length"] = str(stop - start)
    reply_headers["Content-Type"] = media_type
    if request.method == "HEAD" or stop == start:
        return Response(status_code=status, headers=reply_headers)
    return _pieces(request, body, start, stop, status, reply_headers, held)


def document(request: Request, data: bytes) -> Response:
    """The reply with a JSON document that can be long; its memory is counted until it is sent.

    Raises:
        Problem: the reply is too large, or there is no memory for it now.
    """
    body = Body([InMemory(data)])
    check_size(body.nbytes, state_of(request).settings.max_reply)
    headers = {"Content-Length": str(body.nbytes), "Content-Type": JSON}
    return _pieces(request, body, 0, body.nbytes, 200, headers, None)


def _pieces(
    request: Request,
    body: Body,
    start: int,
    stop: int,
    status: int,
    headers: Mapping[str, str],
    held: Account | None,
) -> Response:
    state = state_of(request)
    if held is None and body.held_nbytes:
        held = hold(request, body.held_nbytes)
    state.metrics.set_memory(state.budget.held)
    try:
        return _Pieces(body, (start, stop), status, headers, state.settings.stall_s, held)
    except BaseException:
        if held is not None:
            held.close()
        raise


def hold(request: Request, nbytes: int) -> Account:
    """Hold memory for the reply to a request.

    Raises:
        Problem: there is no memory for it, now or ever.
    """
    budget = state_of(request).budget
    budget.check(nbytes, "this reply takes", "ask for less at once")
    return budget.hold(scope_of(request).client, nbytes)


def held_at_once(request: Request, nbytes: int) -> Account | None:
    """Hold memory for the reply if there is room without giving up other memory, for which the event loop cannot wait;
    else None.
    """
    account = state_of(request).budget.account(scope_of(request).client)
    if account.has_grown(nbytes, nbytes):
        return account
    account.close()
    return None


def check_size(nbytes: int, limit: int, option: str = "--max-reply") -> None:
    """
    Args:
        nbytes: bytes of a reply.
        limit: bytes that are allowed.
        option: option of the server that sets the limit.

    Raises:
        Problem: the reply would be larger than the limit.
    """
    if nbytes > limit:
        raise Problem(
            413,
            "too-large",
            f"the reply would have {nbytes} bytes, and {limit} are allowed; ask for less at once, or start the server "
            f"with a larger {option}",
        )


def _is_known(header: str | None, tag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or tag in (known.strip().removeprefix("W/") for known in header.split(","))


def _range(wanted: "re.Match[str]", nbytes: int) -> tuple[int, int]:
    first, last, suffix = wanted.groups()
    if suffix is not None:
        start, stop = max(0, nbytes - int(suffix)), nbytes
    else:
        start, stop = int(first), min(nbytes, int(last) + 1) if last else nbytes
    if start >= stop:
        headers = {"Content-Range": f"bytes */{nbytes}"}
        raise Problem(416, "range", f"there are {nbytes} bytes, and the range has none of them", headers)
    return start, stop


class _Pieces(Response):
    """A reply that sends one piece while the next one is read; no more is in memory, however slow the client is."""

    def __init__(
        self,
        body: Body,
        part: tuple[int, int],
        status: int,
        headers: Mapping[str, str],
        stall_s: float,
        held: Account | None,
    ) -> None:
        super().__init__(status_code=status, headers=dict(headers))
        nbytes = part[1] - part[0]
        self._pieces = body.pieces(*part)
        self._is_ready = body.is_ready
        first = next(self._pieces)
        self._first: Piece | None = first
        self._nbytes = nbytes
        self._is_small = isinstance(first, memoryview) and first.nbytes == nbytes <= _SENT_NBYTES
        self._stall_s = stall_s
        self._rest: bytes | memoryview = b""
        self._sent: Any = _memory_of(first)
        """The object that owns the memory of the last piece that was sent."""
        self._close = None if held is None else weakref.finalize(self, held.close)
        self._held = held

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Implements the call of an ASGI application.

        Raises:
            StorageError: a later piece cannot be read. The connection is then closed before the announced length.
            TimeoutError: the client takes nothing. The connection is then closed before the announced length.
        """
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            if self._is_small:
                piece = self._take()
                assert isinstance(piece, memoryview)
                await self._send(send, piece, is_last=True)
                return
            writer: BodyWriter | None = scope.get(BODY)
            if writer is not None and not await writer.begin():
                writer = None
            leaving = asyncio.create_task(wait_for_disconnect(receive))
            try:
                await self._send_all(send, leaving, writer)
            finally:
                leaving.cancel()
                if writer is not None:
                    writer.end()
        finally:
            self._end()

    def _end(self) -> None:
        """Give the memory back, once the system has sent the last piece."""
        sent, self._sent = self._sent, None
        if self._held is None or self._close is None or self._close.detach() is None:
            return
        if isinstance(sent, np.ndarray):
            weakref.finalize(sent, self._held.close).atexit = False
        else:
            self._held.close()

    def _take(self) -> Piece:
        """Take the first piece; this object does not hold it any more."""
        piece, self._first = self._first, None
        assert piece is not None
        return piece

    async def _send_all(self, send: Send, leaving: "asyncio.Task[None]", writer: BodyWriter | None) -> None:
        if writer is not None and self._is_ready:
            if await writer.write(self._vectors()):
                # A client that has all of it must find the memory free for its next request.
                self._sent = None
                self._end()
                await send({"type": "http.response.body", "body": self._rest, "more_body": False})
            return
        loop = asyncio.get_running_loop()
        piece, n_left = self._take(), self._nbytes
        while True:
            n_left -= piece.nbytes
            ahead = loop.run_in_executor(None, next, self._pieces) if n_left else None
            try:
                if writer is None:
                    await self._send_parts(send, leaving, piece, is_last=not n_left)
                else:
                    assert isinstance(piece, memoryview)  # rows in place are ready, and go another way
                    await writer.write(vectors_of(piece))
                if leaving.done():
                    return
            finally:
                following = None if ahead is None else await ahead
            if following is None:
                break
            piece = following
            self._sent = _memory_of(piece)
        if writer is not None:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _vectors(self) -> Iterator[Vectors]:
        """Yield all of the body but its end, which is kept in ``_rest``."""
        n_left = self._nbytes
        for piece in itertools.chain([self._take()], self._pieces):
            n_left -= piece.nbytes
            if isinstance(piece, Scattered):
                yield piece.vectors()
                piece = memoryview(piece.end())  # the bytes of its last row
            if n_left:
                yield from vectors_of(piece)
            else:
                yield from vectors_of(piece[:-_REST_NBYTES])
                end = piece[-_REST_NBYTES:]
                # If the file was truncated, sending reports it; reading it here would raise a signal.
                self._rest = end if isinstance(end.obj, np.memmap) else bytes(end)

    async def _send_parts(
        self, send: Send, leaving: "asyncio.Task[None]", piece: Piece, *, is_last: bool
    ) -> None:
        """Send a piece through the transport, which may hold some of it."""
        if isinstance(piece, Scattered):
            copies = piece.copies()
            n_left = piece.nbytes
            while n_left and not leaving.done():
                copy = await asyncio.get_running_loop().run_in_executor(None, next, copies)
                n_left -= copy.nbytes
                self._sent = copy.obj
                await self._send(send, copy, is_last=is_last and not n_left)
            return
        for start in range(0, piece.nbytes, _SENT_NBYTES):
            part = piece[start : start + _SENT_NBYTES]
            await self._send(send, part, is_last=is_last and start + part.nbytes == piece.nbytes)
            if leaving.done():
                return

    async def _send(self, send: Send, piece: memoryview, *, is_last: bool) -> None:
        # The system ends a client that takes nothing; this ends one that takes next to nothing.
        async with asyncio.timeout(self._stall_s + piece.nbytes / SLOWEST):
            await send({"type": "http.response.body", "body": piece, "more_body": not is_last})


def _memory_of(piece: Piece) -> Any:
    """The object whose memory the system may still read after the reply has ended; None for rows in place."""
    return piece.obj if isinstance(piece, memoryview) else None
