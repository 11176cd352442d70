"""Clients that go away."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def gone(receive: Receive) -> None:
    """Ends when the client has left. Whatever is sent to it then is lost without an error."""
    while (await receive())["type"] != "http.disconnect":
        pass
