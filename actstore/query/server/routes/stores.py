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
from actstore.query.server.sending.error_replies import documented
from actstore.query.server.sending.reply import document
from actstore.query.server.sharing.scans import Look
from actstore.query.server.state import scope_of, state_of, store_of
from actstore.store.committed_store import CommittedStore
from actstore.store.records.run import Run
from actstore.store.statistics.moments import has_statistics

router = APIRouter(tags=["stores"])


@router.get("/v1/stores", responses=documented(502))
def list_stores(request: Request) -> StoreList:
    """All stores that this client may read."""
    scope, catalog = scope_of(request), state_of(request).catalog
    names = sorted(name for name in catalog.urls() if scope.allows(name))
    return StoreList(stores=tuple(summary(request, name) for name in names))


def summary(request: Request, name: str) -> StoreSummary:
    """A line of the list of stores; one that cannot be read says so."""
    try:
        store = state_of(request).catalog.store(name)
    except ActstoreError as error:
        # One that is damaged does not hide the others.
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


@router.get("/v1/stores/{store}", response_model=StoreDocument, responses=documented(404, 502))
def describe_store(request: Request, store: StoreName) -> Response:
    """A store: its plans, and what of them is committed."""
    found = store_of(request, store)
    found.check_version()  # whoever opens it now shall not hear later that it is another one
    request_of_run = found.plan.request
    described = StoreDocument(
        name=store,
        model=request_of_run.model.name,
        shape=found.shape,
        dtype=request_of_run.dtype,
        n_tokens=found.n_tokens,
        n_segments=found.n_segments,
        n_segments_committed=found.n_committed,
        is_complete=found.is_complete,
        hooks=found.hooks,
        runs=tuple(_run(run) for run in found.runs),
        contents=found.identity,
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
    found: list[tuple[int, int]] = []
    for number in sorted(run.committed):
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


@router.get("/v1/stores/{store}/hooks", response_model=HookList, responses=documented(404, 502))
def list_hooks(request: Request, store: StoreName) -> Response:
    """All hooks of a store, in the order of the forward."""
    found = store_of(request, store)
    listed = HookList(hooks=tuple(_hook(found, name) for name in found.hooks))
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


@router.get("/v1/stores/{store}/hooks/{hook}/stats", responses=documented(404, 409, 502))
async def statistics(request: Request, store: StoreName, hook: HookPath) -> StatisticsDocument:
    """Statistics of a hook over all committed tokens; no activations are read."""
    found = await run_in_threadpool(store_of, request, store)
    name = found[hook].hook

    def merge(look: Look | None) -> StatisticsDocument:
        stats = found.merged_stats(name, look)
        return StatisticsDocument(hook=name, shape=stats.shape, summary=stats.to_dict(), record=stats.record)

    if all(run.finished is not None for run in found.runs):
        return await run_in_threadpool(merge, None)
    # There is a record for each segment.
    scans, client = state_of(request).scans, scope_of(request).client
    return await scans.run(request, client, (id(found), "stats", name), merge)
