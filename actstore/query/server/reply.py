"""A reply of many bytes: ranges, conditions, and sending piece by piece."""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final

from fastapi import Request
from starlette.responses import Response

from actstore.query.problem import Problem
from actstore.query.server.body import Body
from actstore.query.server.state import state_of

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_SENT_NBYTES: Final = 2 << 20
"""Given to the socket at once: what a slow client can have us hold."""
_SLOWEST: Final = 8_000
"""Bytes a second that a client must take."""
_RANGE: Final = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")


def etag(*parts: str) -> str:
    """A strong one of all that decides the bytes of a reply."""
    return '"' + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32] + '"'


def stream(
    request: Request,
    body: Body,
    media_type: str,
    *,
    tag: str | None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The reply: all of the body, a range of it for a GET, or nothing if the client has it already.

    The first piece is made here, so that what cannot be read is told by the status.

    Args:
        request: that is answered.
        body: all of it.
        media_type: of the body.
        tag: another one for any other body; None where it is not known.
        headers: others.

    Raises:
        NotCommittedError: a row is not committed.
        Problem: the range is not within the body, or the reply would be too large.
        StorageError: the first piece cannot be read.
    """
    found = {"Accept-Ranges": "bytes", "Cache-Control": "private, no-cache", **(headers or {})}
    if tag is not None:
        found["ETag"] = tag
        if _is_known(request.headers.get("If-None-Match"), tag):
            return Response(status_code=304, headers=found)
    start, stop, status = 0, body.nbytes, 200
    wanted = _RANGE.fullmatch(request.headers.get("Range", ""))
    if wanted and request.method == "GET" and request.headers.get("If-Range") in (None, tag):
        # Anything but one range of bytes is answered with all, as RFC 9110 allows; and no other method has ranges.
        start, stop = _range(wanted, body.nbytes)
        found["Content-Range"] = f"bytes {start}-{stop - 1}/{body.nbytes}"
        status = 206
    state = state_of(request)
    check_size(stop - start, state.settings.max_reply)
    found["Content-Length"] = str(stop - start)
    found["Content-Type"] = media_type
    if request.method == "HEAD" or stop == start:
        return Response(status_code=status, headers=found)
    hold = partial(state.held.hold, body.held_nbytes)
    return _Pieces(body.pieces(start, stop), stop - start, status, found, state.settings.stall_s, hold)


def check_size(nbytes: int, max_reply: int) -> None:
    """
    Raises:
        Problem: a reply would be larger than is allowed.
    """
    if nbytes > max_reply:
        raise Problem(
            413,
            "too-large",
            f"the reply would have {nbytes} bytes, and {max_reply} are allowed; ask for less at once",
        )


def _is_known(header: str | None, tag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or tag in (each.strip().removeprefix("W/") for each in header.split(","))


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
    """Sends one piece while the next one is read; no more than that is in memory, however slow the client is."""

    def __init__(
        self,
        pieces: Iterator[memoryview],
        nbytes: int,
        status: int,
        headers: Mapping[str, str],
        stall_s: float,
        hold: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(status_code=status, headers=dict(headers))
        self._pieces = pieces
        first = next(pieces)
        self._first: memoryview | None = first
        self._nbytes = nbytes
        self._is_small = first.nbytes == nbytes <= _SENT_NBYTES
        self._stall_s = stall_s
        self._hold = hold

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """As ASGI has it.

        Raises:
            Problem: other clients hold too much memory.
            StorageError: a later piece cannot be read. The connection is closed then, before the announced length.
            TimeoutError: the client takes nothing. Likewise.
        """
        del scope
        with self._hold():
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            if self._is_small:
                await self._send(send, self._taken(), is_last=True)
                return
            gone = asyncio.create_task(_gone(receive))
            try:
                await self._send_all(send, gone)
            finally:
                gone.cancel()

    def _taken(self) -> memoryview:
        """The first piece, which nothing here holds any more."""
        piece, self._first = self._first, None
        assert piece is not None
        return piece

    async def _send_all(self, send: Send, gone: "asyncio.Task[None]") -> None:
        loop = asyncio.get_running_loop()
        piece, n_left = self._taken(), self._nbytes
        while True:
            n_after = n_left - piece.nbytes
            ahead = loop.run_in_executor(None, next, self._pieces) if n_after else None
            try:
                for start in range(0, piece.nbytes, _SENT_NBYTES):
                    part = piece[start : start + _SENT_NBYTES]
                    n_left -= part.nbytes
                    await self._send(send, part, is_last=n_left == 0)
                    if gone.done():
                        return
            finally:
                following = None if ahead is None else await ahead
            if following is None:
                return
            piece = following

    async def _send(self, send: Send, piece: memoryview, *, is_last: bool) -> None:
        # A client that takes nothing is ended by the system; here, one that takes next to nothing.
        async with asyncio.timeout(self._stall_s + piece.nbytes / _SLOWEST):
            await send({"type": "http.response.body", "body": piece, "more_body": not is_last})


async def _gone(receive: Receive) -> None:
    """Ends when the client has left. Whatever is sent to it then is lost without an error."""
    while (await receive())["type"] != "http.disconnect":
        pass
