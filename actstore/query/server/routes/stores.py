"""Routes of stores, their hooks and statistics."""

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from actstore.errors import ActstoreError
from actstore.query.documents import (
    HookDocument,
    HookList,
    RunDocument,
    StatisticsDocument,
    StoreDocument,
    StoreList,
    StoreSummary,
)
from actstore.query.server.routes.parameters import HookPath, StoreName
from actstore.query.server.sending.error_replies import error_responses
from actstore.query.server.sending.reply import document
from actstore.query.server.sharing.scans import Look
from actstore.query.server.state import scope_of, state_of, store_of
from actstore.store.committed_store import CommittedStore
from actstore.store.records.run import Run
from actstore.store.statistics.moments import has_statistics

router = APIRouter(tags=["stores"])


@router.get("/v1/stores", responses=error_responses(502))
def list_stores(request: Request) -> StoreList:
    """All stores that this client may read."""
    scope, catalog = scope_of(request), state_of(request).catalog
    names = sorted(name for name in catalog.urls() if scope.allows(name))
    return StoreList(stores=tuple(summary(request, name) for name in names))


def summary(request: Request, name: str) -> StoreSummary:
    """An entry in the list of stores; it has the problem of a store that cannot be read."""
    try:
        store = state_of(request).catalog.store(name)
    except ActstoreError as error:
        # A damaged store does not hide the others.
        return StoreSummary(
            name=name, model=None, shape=None, n_hooks=None, is_complete=None, problem=str(error)
        )
    return StoreSummary(
        name=name,
        model=store.plan.request.model.name,
        shape=store.shape,
        n_hooks=len(store.hooks),
        is_complete=store.is_complete,
        problem=None,
    )


@router.get("/v1/stores/{store}", response_model=StoreDocument, responses=error_responses(404, 502))
def describe_store(request: Request, store: StoreName) -> Response:
    """A store: its plans, and which segments are committed."""
    opened = store_of(request, store)
    opened.check_version()  # a client that opens it now shall not learn later that it was replaced
    request_of_run = opened.plan.request
    described = StoreDocument(
        name=store,
        model=request_of_run.model.name,
        shape=opened.shape,
        dtype=request_of_run.dtype,
        n_tokens=opened.n_tokens,
        n_segments=opened.n_segments,
        n_segments_committed=opened.n_committed,
        is_complete=opened.is_complete,
        hooks=opened.hooks,
        runs=tuple(_run(run) for run in opened.runs),
        contents=opened.identity,
    )
    return document(request, described.model_dump_json().encode())


def _run(run: Run) -> RunDocument:
    return RunDocument(
        plan=run.plan,
        committed=tuple(_ranges(run)),
        has_tokens=run.has_tokens,
        finished=run.finished,
    )


def _ranges(run: Run) -> list[tuple[int, int]]:
    if run.is_complete:
        return [(0, run.plan.n_segments)]
    ranges: list[tuple[int, int]] = []
    for number in sorted(run.committed):
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges


@router.get("/v1/stores/{store}/hooks", response_model=HookList, responses=error_responses(404, 502))
def list_hooks(request: Request, store: StoreName) -> Response:
    """All hooks of a store, in the order of the forward pass."""
    opened = store_of(request, store)
    listed = HookList(hooks=tuple(_hook(opened, name) for name in opened.hooks))
    return document(request, listed.model_dump_json().encode())


def _hook(store: CommittedStore, name: str) -> HookDocument:
    acts = store[name]
    return HookDocument(
        name=name,
        shape=acts.shape,
        axes=acts.axes,
        dtype=acts.rows.dtype,
        nbytes=acts.nbytes,
        has_statistics=has_statistics(store.array_of(name)),
    )


@router.get("/v1/stores/{store}/hooks/{hook}/stats", responses=error_responses(404, 409, 502))
async def statistics(request: Request, store: StoreName, hook: HookPath) -> StatisticsDocument:
    """Statistics of a hook over all committed tokens; no activations are read."""
    opened = await run_in_threadpool(store_of, request, store)
    name = opened[hook].hook

    def merge(look: Look | None) -> StatisticsDocument:
        stats = opened.merged_stats(name, look)
        return StatisticsDocument(hook=name, shape=stats.shape, summary=stats.to_dict(), record=stats.record)

    if all(run.finished is not None for run in opened.runs):
        return await run_in_threadpool(merge, None)
    # An unfinished run has a record for each segment.
    scans, client = state_of(request).scans, scope_of(request).client
    return await scans.run(request, client, (id(opened), "stats", name), merge)
