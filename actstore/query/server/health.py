"""Routes that tell how the server is."""

import logging
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from actstore.errors import ActstoreError, StorageError
from actstore.query.documents import Health
from actstore.query.problem import Problem
from actstore.query.server.problems import documented
from actstore.query.server.state import scope_of, state_of

router, private = APIRouter(tags=["server"]), APIRouter(tags=["server"])
"""The second one needs a token."""
_LOG: Final = logging.getLogger(__name__)


@router.get("/healthz")
async def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", responses={503: documented()[503]})
def readyz(request: Request) -> Health:
    """A store can be opened, or there is none yet below the root."""
    catalog = state_of(request).catalog
    try:
        names = list(catalog.urls())
    except StorageError as error:
        _LOG.error("the stores cannot be listed: %s", error)
        raise _not_ready() from error
    for name in names:
        try:
            catalog.store(name)
            return Health(status="ok")
        except ActstoreError as error:
            _LOG.error("%s cannot be read: %s", name, error)
    if names:
        raise _not_ready()
    return Health(status="ok")


def _not_ready() -> Problem:
    return Problem(503, "busy", "the stores cannot be read now; the log of the server says more")


@private.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=documented(404),
)
def metrics(request: Request) -> Response:
    """For Prometheus; of all worker processes. Needs a token that is good for all stores."""
    if not scope_of(request).is_all:
        raise Problem(404, "not-found", "there is nothing here; /docs lists what there is")
    return PlainTextResponse(state_of(request).metrics.text())
