"""A fast path, past the framework, for the routes that clients use most.

FastAPI takes one to two milliseconds to find a route and check its parameters, as long as it takes to send 4 MB.
Requests that are plainly valid are handed to the same handlers from here; all others go to FastAPI, which reports what
is wrong.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, get_origin

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams
from starlette.responses import Response

from actstore.query.server.connections.disconnect import Receive
from actstore.query.server.sending.error_replies import answer
from actstore.query.server.sending.reply import Send

_MAX_QUERY: Final = 512
"""Bytes of a query whose parsed form is remembered, at most."""


@dataclass(frozen=True)
class HotRoute:
    """A GET route that clients use most."""

    path: str
    """Path as FastAPI writes it."""
    pattern: "re.Pattern[str]"
    """Pattern of paths whose parameters are valid."""
    model: type[BaseModel]
    """Model of the query."""
    handle: Callable[..., Awaitable[Response]]
    """Handler, called with the request, the groups of the pattern by name, and the query."""


class HotRoutes:
    """An ASGI application that answers the hot routes, and hands other requests to another application."""

    def __init__(self, app: FastAPI, routes: "list[HotRoute]") -> None:
        """
        Args:
            app: handles all other requests.
            routes: hot routes; ``app`` has them, too.
        """
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Implements the call of an ASGI application."""
        if scope["type"] == "http" and scope["method"] == "GET":
            for route in self._routes:
                path = route.pattern.fullmatch(scope["path"])
                query = None if path is None else _query(route.model, scope["query_string"])
                if path is not None and query is not None:
                    scope.update(app=self._app, route=route, path_params=path.groupdict())
                    await self._answer(route, query, scope, receive, send)
                    return
        await self._app(scope, receive, send)

    async def _answer(
        self, route: HotRoute, query: BaseModel, scope: Any, receive: Receive, send: Send
    ) -> None:
        request = Request(scope, receive, send)
        try:
            response = await route.handle(request, scope["path_params"], query)
        except Exception as error:  # noqa: BLE001 - as FastAPI does
            response = await answer(request, error)
        await response(scope, receive, send)


def _query(model: type[BaseModel], text: bytes) -> BaseModel | None:
    """The parsed query; None if FastAPI must report what is wrong with it."""
    return _parsed_query(model, text) if len(text) <= _MAX_QUERY else None


@lru_cache(maxsize=256)
def _parsed_query(model: type[BaseModel], text: bytes) -> BaseModel | None:
    parameters = QueryParams(text)
    fields = model.model_fields
    try:
        return model.model_validate(
            {
                name: parameters.getlist(name)
                if name in fields and get_origin(fields[name].annotation) is list
                else parameters[name]
                for name in parameters
            }
        )
    except ValidationError:
        return None
