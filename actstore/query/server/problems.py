"""Errors of handlers as replies, and how OpenAPI describes them."""

import logging
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from actstore.errors import ActstoreError
from actstore.query.problem import Problem
from actstore.query.server.gate import STORE_URL
from actstore.query.wire import PROBLEM

_LOG: Final = logging.getLogger(__name__)
_SCHEMA: Final = {"$ref": "#/components/schemas/ProblemDocument"}
_TEXTS: Final = {
    400: "This is no HTTP, or the URL is too long.",
    401: "A valid token is needed.",
    404: "There is no such thing here, for this client.",
    405: "Another method is needed.",
    406: "None of the accepted formats can be given.",
    409: "Rows are not committed yet.",
    403: "There is no such store, for this client.",
    413: "More than may be asked for at once.",
    416: "The range has none of the bytes.",
    422: "The request is not valid.",
    429: "Too many requests of this client are under way.",
    502: "The storage does not answer as it should.",
    503: "The server is busy.",
}
_LATER: Final = ("Retry-After", "Seconds after which to ask again.")
_HEADERS: Final = {
    401: ("WWW-Authenticate", "How to send a token."),
    416: ("Content-Range", "How many bytes there are."),
    429: _LATER,
    503: _LATER,
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of these statuses, and of those that any request for a store may get."""
    return {status: _documented(status) for status in sorted({*statuses, 400, 401, 413, 422, 429, 503})}


def _documented(status: int) -> dict[str, Any]:
    found: dict[str, Any] = {"description": _TEXTS[status], "content": {PROBLEM: {"schema": _SCHEMA}}}
    if status in _HEADERS:
        name, text = _HEADERS[status]
        found["headers"] = {name: {"description": text, "required": True, "schema": {"type": "string"}}}
    return found


def answer_errors(app: FastAPI) -> None:
    """Have whatever a handler raises answered by a problem."""
    for kind in (ActstoreError, MemoryError):
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unknown)


def reply(problem: Problem) -> Response:
    """A problem, sent."""
    return JSONResponse(problem.document, problem.status, problem.headers, media_type=PROBLEM)


async def _known(request: Request, error: Exception) -> Response:
    problem = Problem.of(error)
    if problem.status >= 500:
        _LOG.error("%s %s: %s", request.method, request.url.path, error)
    url = request.scope.get(STORE_URL)
    if url is not None:
        # Where it is on the disk of the server is nobody's business.
        problem.args = (str(problem).replace(url, f"the store {request.path_params.get('store')}"),)
    return reply(problem)


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(each) for each in first["loc"][1:]) or str(first["loc"][0])
    hint = "/docs says what can be asked for"
    if place == "body":
        hint = f"send JSON with Content-Type: application/json; {hint}"
    return reply(Problem(422, "invalid", f"{place}: {first['msg']}; {hint}"))


async def _http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, Problem):  # of `Gate`, while the body was read
        return reply(error.__cause__)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        return reply(Problem(405, "method", "this resource has another method; /docs lists them", headers))
    if error.status_code == 404:
        return reply(Problem(404, "not-found", "there is nothing here; /docs lists what there is", headers))
    return reply(Problem(422, "invalid", str(error.detail), headers))


async def _unknown(request: Request, error: Exception) -> Response:
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return reply(Problem.of(error))
