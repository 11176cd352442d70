"""Turns errors of handlers into replies, and describes them for OpenAPI."""

import logging
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from actstore.errors import ActstoreError, StoreReplacedError
from actstore.query.problem import LATER, Problem
from actstore.query.selection import FORMS
from actstore.query.server.admission.gate import STORE_ID, STORE_URL, STORE_VERSION
from actstore.query.server.state import state_of
from actstore.query.wire import PROBLEM

_LOG: Final = logging.getLogger(__name__)
_SCHEMA: Final = {"$ref": "#/components/schemas/ProblemDocument"}
_TEXTS: Final = {
    400: "The request is no valid HTTP, or the URL is too long.",
    401: "A valid token is needed.",
    404: "The resource does not exist, or this client may not read it.",
    405: "Another method is needed.",
    406: "None of the accepted formats can be given.",
    409: "Rows are not committed yet, or the store is of another model.",
    403: "A page of another site sent the request; below `/zarr` also: there is no such store for this client.",
    413: "The request asks for more than is allowed at once.",
    416: "The range has none of the bytes.",
    421: "The server does not have this name.",
    422: "The request is not valid.",
    429: "Too many requests of this client are under way.",
    500: "The forward of the model failed.",
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


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI responses of these statuses, and of those that any request for a store may get."""
    return {
        status: _error_response(status)
        for status in sorted({*statuses, 400, 401, 403, 413, 421, 422, 429, 503})
    }


def _error_response(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {"description": _TEXTS[status], "content": {PROBLEM: {"schema": _SCHEMA}}}
    if status in _HEADERS:
        name, text = _HEADERS[status]
        response["headers"] = {name: {"description": text, "required": True, "schema": {"type": "string"}}}
    return response


def answer_errors(app: FastAPI) -> None:
    """Have errors of handlers answered with a problem."""
    for kind in (ActstoreError, MemoryError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


async def answer(request: Request, error: Exception) -> Response:
    """The reply to a client for an error of a handler."""
    match error:
        case ActstoreError() | MemoryError():
            return _reply_to_known(request, error)
        case RequestValidationError():
            return _reply_to_invalid(error)
        case HTTPException():
            return _reply_to_http(error)
        case _:
            _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
            return reply(Problem.of(error))


def reply(problem: Problem) -> Response:
    """The reply with a problem."""
    return JSONResponse(problem.document, problem.status, problem.headers, media_type=PROBLEM)


def _reply_to_known(request: Request, error: Exception) -> Response:
    if isinstance(error, StoreReplacedError):
        return reply(_replaced_problem(request, error))
    problem = Problem.of(error)
    if problem.status >= 500:
        _LOG.error("%s %s: %s", request.method, request.url.path, error)
    url = request.scope.get(STORE_URL)
    if url is not None:
        # Clients must not learn where a store is on the disk of the server.
        problem.args = (str(problem).replace(url, f"the store {request.path_params.get('store')}"),)
    return reply(problem)


def _replaced_problem(request: Request, error: StoreReplacedError) -> Problem:
    """The problem of a replaced store. A request that is repeated opens the new store, and the client notices if it had
    opened the old one.
    """
    name = request.path_params.get("store", "")
    _LOG.warning("%s %s: %s", request.method, request.url.path, error)
    state_of(request).catalog.forget(name)
    for field in (STORE_ID, STORE_VERSION):
        request.scope.pop(field, None)
    return Problem(503, "busy", f"the store {name} was replaced; ask again for what is there now", LATER)


def _reply_to_invalid(error: RequestValidationError) -> Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    words = FORMS.get(first.get("ctx", {}).get("pattern"), first["msg"])
    hint = "/docs describes all requests"
    if place == "body":
        hint = f"send JSON with Content-Type: application/json; {hint}"
    return reply(Problem(422, "invalid", f"{place}: {words}; {hint}"))


def _reply_to_http(error: HTTPException) -> Response:
    if isinstance(error.__cause__, Problem):  # an error of `Gate`, raised while the body was read
        return reply(error.__cause__)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        return reply(Problem(405, "method", "this resource has another method; /docs lists them", headers))
    if error.status_code == 404:
        return reply(Problem(404, "not-found", "there is nothing here; /docs lists what there is", headers))
    return reply(Problem(422, "invalid", str(error.detail), headers))
