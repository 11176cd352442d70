"""Notices clients that disconnect."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client has disconnected. Whatever is sent to it then is lost without an error."""
    while (await receive())["type"] != "http.disconnect":
        pass
