"""Routes that tell how the server is."""

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from actstore.query.documents import Health
from actstore.query.problem import Problem
from actstore.query.server.sending.error_replies import documented
from actstore.query.server.state import scope_of, state_of

router, private = APIRouter(tags=["server"]), APIRouter(tags=["server"])
"""The second one needs a token."""


@router.get("/healthz")
async def healthz() -> Health:
    """The process answers; for that it needs no thread and no storage."""
    return Health(status="ok")


@router.get("/readyz", responses={503: documented()[503]})
async def readyz(request: Request) -> Health:
    """Somebody is let in, and a store can be opened, or there is none yet below the root. Answers within seconds."""
    await state_of(request).readiness.check()
    return Health(status="ok")


@private.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=documented(404),
)
def metrics(request: Request) -> Response:
    """For Prometheus; of all worker processes. Needs a token that is good for all stores."""
    if not scope_of(request).is_all:
        raise Problem(404, "not-found", "there is nothing here; /docs lists what there is")
    state = state_of(request)
    state.metrics.set_memory(state.budget.held)
    return PlainTextResponse(state.metrics.text())
