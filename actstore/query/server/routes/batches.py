"""Routes of batches and their order."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from actstore.errors import LoaderError
from actstore.loader.arguments import SHUFFLES
from actstore.loader.batches.batch import Batch
from actstore.loader.batches.footprint import batch_nbytes
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.options import LoaderOptions, dtype_name, options_of
from actstore.query.documents import OrderDocument
from actstore.query.problem import Problem
from actstore.query.selection import parse_axis
from actstore.query.server.catalog.catalog import NAME
from actstore.query.server.routes.accept import Format, names_any, not_acceptable, preferred_format
from actstore.query.server.routes.hot_routes import HotRoute
from actstore.query.server.routes.parameters import BatchOf, BatchQuery, StoreName
from actstore.query.server.routes.slices import RANGES, header, tag_of, tensor_responses
from actstore.query.server.sending.body import Body, InMemory, InPlace, Part
from actstore.query.server.sending.error_replies import error_responses
from actstore.query.server.sending.formats import raw_headers, safetensors_header
from actstore.query.server.sending.reply import check_size, held_at_once, stream
from actstore.query.server.sharing.known_rows import RowScan
from actstore.query.server.sharing.order_memory import checked_footprint
from actstore.query.server.sharing.shared_batches import MOST_AT_ONCE, OrderUse, order_given_up
from actstore.query.server.sharing.slots import Lease, Lent, Made
from actstore.query.server.sharing.torch_loading import is_torch_loaded, load_torch
from actstore.query.server.state import cached_store, scope_of, state_of, store_of
from actstore.query.wire import (
    N_BATCHES,
    N_HERE,
    OPTIONS_AS_THEY_ARE,
    ORDER,
    POSITIONS,
    RAW,
    SAFETENSORS,
    SEQUENCES,
    TOKENS,
)
from actstore.store.committed_store import CommittedStore

if TYPE_CHECKING:
    import torch


router = APIRouter(tags=["training"])

Number = Annotated[int, Path(ge=0, le=1 << 62, description="Number of the batch in its epoch.")]


class NumberedQuery(BatchQuery):
    """An order of rows, and an epoch of it."""

    epoch: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    """Number of the epoch. Each epoch has its own order."""
    count: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = 1
    """Batches of the epoch from this one on, at most, as raw bytes. The reply can have fewer."""


def _batch_responses() -> dict[int | str, dict[str, Any]]:
    responses = tensor_responses(RAW, SAFETENSORS)
    for response in responses.values():
        response["headers"] = {
            **response["headers"],
            N_BATCHES: header("Batches of an epoch.", "integer"),
            N_HERE: header("Batches of the reply.", "integer"),
            ORDER: header("Version of the order; it changes whenever any batch changes."),
        }
    return responses


def _options(request: Request, store: CommittedStore, query: BatchQuery) -> LoaderOptions:
    """
    Raises:
        HookError: a hook is not stored.
        Problem: a position is out of bounds.
        LoaderError: an option is not valid.
    """
    settings = state_of(request).settings
    length = store.plan.context_length
    positions = None if query.seqpos == ":" else list(parse_axis(query.seqpos, length, "seqpos"))
    return options_of(
        store,
        query.hook[0] if len(query.hook) == 1 else query.hook,
        **{name: getattr(query, name) for name in OPTIONS_AS_THEY_ARE},
        shuffle=SHUFFLES[query.shuffle],
        drop=[dropped if dropped.isalpha() else int(dropped) for dropped in query.drop],
        seqpos=positions,
        max_norm=query.max_norm,
        epochs=None,
        dtype=query.dtype,
        cache_dir=settings.cache_dir,
        cache_limit=settings.cache_limit,
    )


@dataclass(frozen=True)
class BatchRange:
    """The batches that a request asks for."""

    epoch: int
    k: int
    count: int
    """Number of batches at most."""


@dataclass(frozen=True)
class _BegunOrder:
    """An order in use, and a batch of it that is begun, if the request asks for one."""

    store: CommittedStore
    used: OrderUse
    options: LoaderOptions
    lease: Lease | None = None
    n_batches: int = 1
    """Number of batches of the lease."""


async def _begin(
    request: Request, name: str, query: BatchQuery, batch_range: BatchRange | None
) -> _BegunOrder:
    """Begin an order, and a batch of it if the request asks for one by epoch and number."""
    store = cached_store(request, name)
    if store is not None and is_torch_loaded():
        # A thread is needed only where there is something to wait for.
        options = _options(request, store, query)
        used = state_of(request).batches.ready_order(store, options, scope_of(request).client)
        if used is not None:
            return _with_batch(request, store, used, options, batch_range)
    begun = await run_in_threadpool(_begin_in_thread, request, name, query, batch_range)
    if isinstance(begun, RowScan):
        scans, client = state_of(request).scans, scope_of(request).client
        rows = await scans.run(request, client, begun.key, begun)
        begun = await run_in_threadpool(_begin_in_thread, request, name, query, batch_range, rows)
    assert isinstance(begun, _BegunOrder)
    return begun


def _begin_in_thread(
    request: Request,
    name: str,
    query: BatchQuery,
    batch_range: BatchRange | None,
    rows: ValidRows | None = None,
) -> _BegunOrder | RowScan:
    """Begin an order, and a batch of it; or return the scan that must be run first."""
    load_torch()
    state, client = state_of(request), scope_of(request).client
    store = store_of(request, name)
    options = _options(request, store, query)
    # The whole batch is made, even if only one rank asks for it.
    check_size(batch_nbytes(store, options), state.settings.max_batch, "--max-batch")
    if batch_range is not None:
        _is_raw(request, options)  # raises if the format is not acceptable, before anything is read
    if not store.is_complete:
        for hook in options.hooks:
            store[hook].rows.check_committed()
    known = state.known_rows.find(store, options, client) if rows is None else rows
    if isinstance(known, RowScan):
        checked_footprint(state.budget, store, replace(options, rank=0, world_size=1))
        return known
    return _with_batch(
        request, store, state.batches.order(store, options, client, known), options, batch_range
    )


def _with_batch(
    request: Request,
    store: CommittedStore,
    used: OrderUse,
    options: LoaderOptions,
    batch_range: BatchRange | None,
) -> _BegunOrder:
    """Begin a batch of an order, if the request asks for one."""
    if batch_range is None:
        return _BegunOrder(store, used, options)
    order = used.order
    n_left = order.maker.batches.n_batches - batch_range.k
    n_wanted = batch_range.count if _is_raw(request, options) else 1
    n = max(1, min(n_wanted, n_left, order.at_once(state_of(request).settings.max_batch)))
    try:
        lease = order.batch(batch_range.epoch, batch_range.k, scope_of(request).client, n)
    except IndexError as error:
        raise LoaderError(str(error)) from error
    return _BegunOrder(store, used, options, lease, n)


@router.get("/v1/stores/{store}/batches", responses=error_responses(404, 409, 502))
async def describe_order(request: Request, store: StoreName, query: BatchOf) -> OrderDocument:
    """How many rows and batches an epoch has; none of them is read."""
    begun = await _begin(request, store, query, None)
    order = begun.used.order
    return OrderDocument(
        n_rows=order.maker.rows.n_valid,
        n_batches=order.maker.batches.n_batches,
        hooks=begun.options.hooks,
        version=order.version,
        identity=order.maker.identity(),
        at_once=order.at_once(state_of(request).settings.max_batch),
    )


@router.get(
    "/v1/stores/{store}/batches/{k}",
    response_class=Response,
    responses=_batch_responses() | error_responses(404, 406, 409, 416, 502),
    openapi_extra=RANGES,
)
async def batch(
    request: Request, store: StoreName, k: Number, query: Annotated[NumberedQuery, Query()]
) -> Response:
    """Batch k of an epoch, and those after it if `count` says so, in the order of `Store.loader`: raw bytes of one
    hook, else safetensors.

    Requests for the same or for neighbouring batches share what is read.
    """
    begun = await _begin(request, store, query, BatchRange(query.epoch, k, query.count))
    used, options, lease = begun.used, begun.options, begun.lease
    assert lease is not None
    order = used.order
    try:
        # Many requests may wait, and none holds a thread. A client that leaves does not cancel the batch for others.
        whole = await asyncio.shield(asyncio.wrap_future(lease.made))
    except asyncio.CancelledError as error:
        if lease.made.cancelled():
            raise order_given_up() from error
        raise
    finally:
        used.end()
    made = order.part(whole, k, query.rank, query.world_size)
    is_raw = _is_raw(request, options)
    named_tensors = _tensors_of(made, options.hooks[0], lease, begun.store)
    body, headers = _raw(named_tensors) if is_raw else (_safetensors(named_tensors), {})
    asked = (query.model_dump_json(), str(k), "raw" if is_raw else "safetensors", str(begun.n_batches))
    reply = partial(
        stream,
        request,
        body,
        RAW if is_raw else SAFETENSORS,
        tag=tag_of(begun.store, *asked),
        headers={
            N_BATCHES: str(order.maker.batches.n_batches),
            N_HERE: str(begun.n_batches),
            ORDER: order.version,
            "Vary": "Accept",
            **headers,
        },
    )
    held = held_at_once(request, body.held_nbytes) if body.held_nbytes else None
    if held is None and body.held_nbytes:
        return await run_in_threadpool(reply)
    return reply(held=held)


async def _batch(request: Request, path: dict[str, str], query: NumberedQuery) -> Response:
    return await batch(request, path["store"], int(path["k"]), query)


HOT: Final = HotRoute(
    "/v1/stores/{store}/batches/{k}",
    re.compile(rf"/v1/stores/(?P<store>{NAME[1:-1]})/batches/(?P<k>[0-9]{{1,18}})"),
    NumberedQuery,
    _batch,
)


def _is_raw(request: Request, options: LoaderOptions) -> bool:
    """Whether the reply is raw bytes, and not safetensors. `Accept` is ignored if it names neither.

    Raises:
        Problem: `Accept` excludes all formats that these options have.
    """
    offered: list[Format] = ["raw", "safetensors"]
    accept = request.headers.get("Accept")
    if not names_any(accept, offered):
        accept = None
    is_one = options.is_single and not options.provenance
    preferred = preferred_format(accept, offered if is_one else ["safetensors"])
    if preferred is None and is_one:
        raise not_acceptable(accept, offered)
    if preferred is None:
        raise Problem(
            406,
            "not-acceptable",
            "raw bytes are of one hook without provenance; accept application/x-safetensors",
        )
    return preferred == "raw"


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a reply."""

    dtype: str
    shape: tuple[int, ...]
    parts: Sequence[Part]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def _tensors_of(made: Made, hook: str, lease: Lease, store: CommittedStore) -> dict[str, _Tensor]:
    """The tensors of a batch, by name."""
    if isinstance(made, Lent):
        return {
            name: _Tensor(
                dtype_name(store[name].dtype),
                (sum(len(batch[name]) for batch in made.batches), *store[name].shape[2:]),
                [InPlace(batch[name]) for batch in made.batches],
            )
            for name in made.batches[0]
        }
    values = made.values if isinstance(made, Batch) else made
    named = dict(values) if isinstance(values, dict) else {hook: values}
    if isinstance(made, Batch):
        named |= {SEQUENCES: made.sequences, POSITIONS: made.positions, TOKENS: made.tokens}
    return {
        name: _Tensor(dtype_name(tensor.dtype), tuple(tensor.shape), [_bytes(tensor, lease)])
        for name, tensor in named.items()
    }


def _raw(named_tensors: dict[str, _Tensor]) -> tuple[Body, dict[str, str]]:
    (tensor,) = named_tensors.values()
    return Body(tensor.parts), raw_headers(tensor.dtype, tensor.shape)


def _safetensors(named_tensors: dict[str, _Tensor]) -> Body:
    head = safetensors_header(
        [(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in named_tensors.items()]
    )
    return Body([InMemory(head), *(part for tensor in named_tensors.values() for part in tensor.parts)])


def _bytes(tensor: "torch.Tensor", lease: Lease) -> InMemory:
    if not tensor.numel():
        return InMemory(b"")
    import torch

    body_part = InMemory(tensor.contiguous().view(-1).view(torch.uint8).numpy(), is_counted=True)
    lease.hold_for(body_part.array)
    return body_part
