"""The application of a server without its sockets: it answers single requests in milliseconds."""

import asyncio
from typing import Any

import httpx

from actstore.query.server.app import create_app
from actstore.query.server.settings import Settings


class App:
    """An application that answers one request after the other."""

    def __init__(self, **settings: Any) -> None:
        """
        Args:
            settings: settings of the server.
        """
        self._app: Any = create_app(Settings(**settings))

    def ask(self, path: str, *, method: str = "GET", **headers: str) -> httpx.Response:
        """The whole reply to a request.

        Args:
            path: path below ``/v1/stores/``.
            method: HTTP method.
            headers: headers of the request, where ``If_None_Match`` is ``If-None-Match``.
        """

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                sent = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, f"/v1/stores/{path}", headers=sent)

        return asyncio.run(ask())
