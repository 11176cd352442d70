"""Routes for health checks and metrics."""

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from actstore.query.documents import Health
from actstore.query.problem import Problem
from actstore.query.server.sending.error_replies import error_responses
from actstore.query.server.state import scope_of, state_of

router, private = APIRouter(tags=["server"]), APIRouter(tags=["server"])
"""Routes that need no token, and routes that need one."""


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process answers; it needs no thread and no storage."""
    return Health(status="ok")


@router.get("/readyz", responses={503: error_responses()[503]})
async def readyz(request: Request) -> Health:
    """Whether some token is valid, and a store can be opened, or there is none yet below the root. Answers within
    seconds.
    """
    await state_of(request).readiness.check()
    return Health(status="ok")


@private.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=error_responses(404),
)
def metrics(request: Request) -> Response:
    """Metrics for Prometheus, over all worker processes. Needs a token that opens all stores."""
    if not scope_of(request).is_all:
        raise Problem(404, "not-found", "there is nothing here; /docs lists what there is")
    state = state_of(request)
    state.metrics.set_memory(state.budget.held)
    return PlainTextResponse(state.metrics.text())
