"""The application: routes, errors, limits."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

from fastapi import FastAPI, Security
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer

from actstore.query.documents import ProblemDocument
from actstore.query.server import health, orders, plans, prompts, slices, stores, zarr_files
from actstore.query.server.access import Access
from actstore.query.server.batches import SharedBatches
from actstore.query.server.catalog import Catalog
from actstore.query.server.gate import Gate
from actstore.query.server.metrics import Metrics
from actstore.query.server.problems import answer_errors
from actstore.query.server.settings import Settings
from actstore.query.server.state import State

VERSION: Final = "1"
_DESCRIPTION: Final = (
    "Stored activations of language models: slices, batches, prompts, and the store as Zarr v3."
)
_BEARER: Final = HTTPBearer(auto_error=False, description="Needed where the server was given a token file.")


def create_app(settings: Settings) -> Gate:
    """The whole server as an ASGI application.

    Raises:
        JobError: the token file is not as it should be.
        StorageError: the root cannot be opened.
    """
    metrics = Metrics()
    access = None if settings.token_file is None else Access(settings.token_file)
    catalog = Catalog(settings.stores, settings.root)
    batches = SharedBatches(metrics, settings.max_held)
    app = _routes()
    app.state.actstore = State(settings, catalog, batches, metrics)
    return Gate(app, settings, access, metrics)


def openapi() -> dict[str, Any]:
    """The document of ``schemas/openapi.json``."""
    found: dict[str, Any] = _routes().openapi()
    return found


def _routes() -> FastAPI:
    app = FastAPI(
        title="actstore",
        version=VERSION,
        description=_DESCRIPTION,
        redoc_url=None,
        lifespan=_lifespan,
        separate_input_output_schemas=False,
    )
    for module in (health, stores, slices, prompts, orders, plans, zarr_files):
        needs = [] if module is health else [Security(_BEARER)]
        app.include_router(module.router, dependencies=needs)
    answer_errors(app)
    app.openapi = lambda: _documented(app)  # type: ignore[method-assign]
    return app


def _documented(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        problem = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
        found["components"]["schemas"]["ProblemDocument"] = problem
        app.openapi_schema = found
    return app.openapi_schema


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.actstore.batches.close()
