"""Builds the application of the server: routes, error replies and limits."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

from fastapi import FastAPI, Security
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from actstore.query.documents import ProblemDocument
from actstore.query.server.admission.access import Access
from actstore.query.server.admission.gate import Gate
from actstore.query.server.catalog.catalog import Catalog
from actstore.query.server.computing.model_process import ModelProcess
from actstore.query.server.connections.connection import REFUSED
from actstore.query.server.memory.budget import MemoryBudget
from actstore.query.server.monitoring.access_log import AccessLog
from actstore.query.server.monitoring.metrics import Metrics
from actstore.query.server.pages import welcome
from actstore.query.server.readiness import Readiness
from actstore.query.server.routes import (
    activations,
    health,
    picks,
    plans,
    prompts,
    slices,
    stores,
    zarr_files,
)
from actstore.query.server.routes import batches as batch_routes
from actstore.query.server.routes.hot_routes import HotRoutes
from actstore.query.server.sending.error_replies import answer_errors
from actstore.query.server.settings import Settings
from actstore.query.server.sharing.known_rows import KnownRows
from actstore.query.server.sharing.scans import Scans, Words
from actstore.query.server.sharing.shared_batches import SharedBatches
from actstore.query.server.state import State
from actstore.query.wire import CONTENTS, STORE

VERSION: Final = "1"
_DESCRIPTION: Final = (
    "Stored activations of language models: slices, batches, prompts, and the store as Zarr v3."
)
_TAGS: Final = (
    {"name": "server", "description": "How the server is."},
    {"name": "stores", "description": "Which stores and hooks there are, and their statistics."},
    {"name": "activations", "description": "Slices and selections."},
    {"name": "prompts", "description": "Which sequences have a text."},
    {"name": "training", "description": "Shuffled batches."},
    {"name": "zarr", "description": "The objects of a store, for readers of Zarr v3."},
)
_BEARER: Final = HTTPBearer(auto_error=False, description="Needed where the server was given a token file.")


_IDLE_S: Final = 60.0
"""Seconds after which the server gives back the memory of an order of batches that nobody uses."""
_NOT_DESCRIBED: Final = "Successful Response"
"""Description that FastAPI gives to a reply without one."""


def create_app(settings: Settings) -> Gate:
    """The whole server as an ASGI application.

    Raises:
        StorageError: the root cannot be opened, or the access log cannot be written.
    """
    metrics = Metrics()
    log = None if settings.access_log is None else AccessLog(settings.access_log, metrics.count_dropped_lines)
    access = None if settings.token_file is None else Access(settings.token_file)
    catalog = Catalog(settings.stores, settings.root, settings.allow_links)
    budget = MemoryBudget(settings.max_held)
    batches = SharedBatches(metrics, budget)
    app = _routes()
    scans = Scans(settings.scans, settings.timeout_s, metrics)
    app.state.actstore = State(
        settings,
        catalog,
        batches,
        metrics,
        budget,
        KnownRows(budget),
        scans,
        Readiness(catalog, access),
        _computing(settings, metrics),
        access,
        log,
    )
    return Gate(HotRoutes(app, [slices.HOT, batch_routes.HOT]), settings, access, metrics, budget, log)


def _computing(settings: Settings, metrics: Metrics) -> tuple[ModelProcess, Scans] | None:
    if settings.compute is None:
        return None
    queue = Scans(
        1,
        settings.timeout_s,
        metrics,
        n_waiting=settings.compute_pending,
        n_waiting_per_client=max(2, settings.compute_pending // 4),
        words=Words("a computation", "computations", "computations"),
    )
    return ModelProcess(settings.compute), queue


def openapi() -> dict[str, Any]:
    """The document of ``schemas/openapi.json``."""
    document: dict[str, Any] = _routes().openapi()
    return document


def _routes() -> FastAPI:
    app = FastAPI(
        title="actstore",
        version=VERSION,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    app.include_router(health.router)
    app.include_router(health.private, dependencies=[Security(_BEARER)])
    app.include_router(welcome.router)
    for module in (stores, slices, picks, prompts, activations, batch_routes, plans, zarr_files):
        app.include_router(module.router, dependencies=[Security(_BEARER)])
    answer_errors(app)
    app.openapi = lambda: _openapi_document(app)  # type: ignore[method-assign]
    return app


def _openapi_document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            tags=list(_TAGS),
            license_info={"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        )
        schemas = document["components"]["schemas"]
        schemas["ProblemDocument"] = ProblemDocument.model_json_schema(
            ref_template="#/components/schemas/{model}"
        )
        operations = [
            (path, operation) for path, methods in document["paths"].items() for operation in methods.values()
        ]
        for path, operation in operations:
            operation["summary"] = operation["operationId"].replace("_", " ").capitalize()
            for parameter in operation.get("parameters", ()):
                _without_null(parameter["schema"])
            for reply in operation["responses"].values():
                if "{store}" in path:
                    reply["headers"] = {**reply.get("headers", {}), STORE: _STORE, CONTENTS: _CONTENTS}
                if reply["description"] == _NOT_DESCRIBED:
                    schema = next(iter(reply["content"].values()))["schema"]
                    name = schema.get("$ref", "").rpartition("/")[2]
                    reply["description"] = schemas.get(name, {}).get("description", "As text.")
        app.openapi_schema = document
    return app.openapi_schema


_STORE: Final = {
    "description": "Identifies the store, and stays the same while the store grows. Only in replies about a store.",
    "schema": {"type": "string"},
}

_CONTENTS: Final = {
    "description": "Changes whenever the store grows or is replaced: the number of its runs, "
    "and a hash over the `contents` of its description.",
    "schema": {"type": "string"},
}


def _without_null(schema: dict[str, Any]) -> None:
    """Take null out of the schema of an optional parameter, as a URL has no null."""
    kinds = schema.get("anyOf", [])
    if {"type": "null"} in kinds:
        kinds.remove({"type": "null"})
        if len(kinds) == 1:
            schema.update(schema.pop("anyOf")[0])


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    state: State = app.state.actstore
    giving_back = asyncio.create_task(_give_back(state.budget))
    if state.access is not None:
        state.access.start()

    def refused(client: str, status: int | None, seconds: float) -> None:
        state.metrics.count_refusal(status)
        if state.log is not None:
            state.log.write_refusal(client, status, seconds)

    yield {REFUSED: refused}
    giving_back.cancel()
    if state.access is not None:
        state.access.close()
    state.scans.close()
    if state.computing is not None:
        model, queue = state.computing
        await run_in_threadpool(queue.close)
        await run_in_threadpool(model.close)
    state.batches.close()
    if state.log is not None:
        await run_in_threadpool(state.log.close)
    for handler in logging.getLogger("actstore").handlers:
        # A worker process ends by a signal, so Python does not flush its logs at the end.
        await run_in_threadpool(handler.flush)


async def _give_back(budget: MemoryBudget) -> None:
    """Give back, now and then, the memory that nobody uses."""
    while True:
        await asyncio.sleep(_IDLE_S / 4)
        await run_in_threadpool(budget.give_up_idle, _IDLE_S)
