"""Routes of batches."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Final

import torch
from fastapi import APIRouter, Path, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from actstore.errors import LoaderError
from actstore.loader.batches.batch import Batch
from actstore.loader.batches.footprint import batch_nbytes
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.options import LoaderOptions, dtype_name, options_of
from actstore.query.documents import OrderDocument
from actstore.query.problem import Problem
from actstore.query.selection import parse_axis
from actstore.query.server.catalog.catalog import NAME
from actstore.query.server.routes.hot_routes import HotRoute
from actstore.query.server.routes.parameters import BatchOf, BatchQuery, StoreName
from actstore.query.server.routes.slices import RANGES, header, tag_of, tensors
from actstore.query.server.sending.body import Body, InMemory, InPlace, Part
from actstore.query.server.sending.error_replies import documented
from actstore.query.server.sending.formats import raw_headers, safetensors_header
from actstore.query.server.sending.reply import check_size, held_at_once, stream
from actstore.query.server.sharing.known_rows import RowScan
from actstore.query.server.sharing.order_memory import checked
from actstore.query.server.sharing.shared_batches import MOST_AT_ONCE, InUse, given_up
from actstore.query.server.sharing.slots import Lease, Lent, Made
from actstore.query.server.state import scope_of, state_of, store_at_hand, store_of
from actstore.query.wire import N_BATCHES, N_HERE, ORDER, POSITIONS, RAW, SAFETENSORS, SEQUENCES, TOKENS
from actstore.store.committed_store import CommittedStore

router = APIRouter(tags=["training"])

Number = Annotated[int, Path(ge=0, le=1 << 62, description="Number of the batch in its epoch.")]


class NumberedQuery(BatchQuery):
    """An order of rows, and an epoch."""

    epoch: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    """Each has an order of its own."""
    count: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = 1
    """Batches of the epoch from this one on, at most, as raw bytes. There can be fewer in the reply."""


def _documented_batch() -> dict[int | str, dict[str, Any]]:
    found = tensors(RAW, SAFETENSORS)
    for each in found.values():
        each["headers"] = {
            **each["headers"],
            N_BATCHES: header("Batches of an epoch.", "integer"),
            N_HERE: header("Batches of the reply.", "integer"),
            ORDER: header("Another one where any batch of the order is another one."),
        }
    return found


def _options(request: Request, store: CommittedStore, query: BatchQuery) -> LoaderOptions:
    """
    Raises:
        HookError: a hook is not stored.
        Problem: there is no such position.
        LoaderError: an option that cannot be.
    """
    settings = state_of(request).settings
    positions = None if query.seqpos == ":" else list(parse_axis(query.seqpos, store.shape[1], "seqpos"))
    return options_of(
        store,
        query.hook[0] if len(query.hook) == 1 else query.hook,
        batch_size=query.batch_size,
        seed=query.seed,
        shuffle=None if query.shuffle == "none" else query.shuffle,
        window_rows=query.window_rows,
        drop=[one if one.isalpha() else int(one) for one in query.drop],
        seqpos=positions,
        max_norm=query.max_norm,
        epochs=None,
        drop_last=query.drop_last,
        rank=query.rank,
        world_size=query.world_size,
        dtype=query.dtype,
        provenance=query.provenance,
        cache_dir=settings.cache_dir,
        cache_limit=settings.cache_limit,
    )


@dataclass(frozen=True)
class Place:
    """Which batches are asked for."""

    epoch: int
    k: int
    count: int
    """At most."""


@dataclass(frozen=True)
class _Asked:
    store: CommittedStore
    used: InUse
    options: LoaderOptions
    lease: Lease | None = None
    n_batches: int = 1
    """Of the lease."""


async def _asked(request: Request, name: str, query: BatchQuery, place: Place | None) -> _Asked:
    """An order, and a batch of it that is begun, if one is asked for by epoch and number."""
    store = store_at_hand(request, name)
    if store is not None:
        # No change of threads where there is nothing to wait for.
        options = _options(request, store, query)
        used = state_of(request).batches.at_hand(store, options, scope_of(request).client)
        if used is not None:
            return _with_batch(request, store, used, options, place)
    asked = await run_in_threadpool(_begun, request, name, query, place)
    if isinstance(asked, RowScan):
        scans, client = state_of(request).scans, scope_of(request).client
        rows = await scans.run(request, client, asked.key, asked)
        asked = await run_in_threadpool(_begun, request, name, query, place, rows)
    assert isinstance(asked, _Asked)
    return asked


def _begun(
    request: Request,
    name: str,
    query: BatchQuery,
    place: Place | None,
    rows: ValidRows | None = None,
) -> _Asked | RowScan:
    """The same, or what must be done first."""
    state, client = state_of(request), scope_of(request).client
    store = store_of(request, name)
    options = _options(request, store, query)
    # The whole batch is made, also for a rank.
    check_size(batch_nbytes(store, options), state.settings.max_batch, "--max-batch")
    if place is not None:
        _is_raw(request, options)  # or it is not acceptable, before anything is read
    if not store.is_complete:
        for hook in options.hooks:
            store[hook].rows.check_committed()
    known = state.known_rows.find(store, options, client) if rows is None else rows
    if isinstance(known, RowScan):
        checked(state.budget, store, replace(options, rank=0, world_size=1))
        return known
    return _with_batch(request, store, state.batches.order(store, options, client, known), options, place)


def _with_batch(
    request: Request, store: CommittedStore, used: InUse, options: LoaderOptions, place: Place | None
) -> _Asked:
    """An order that is there, and a batch of it that is begun, if one is asked for."""
    if place is None:
        return _Asked(store, used, options)
    order = used.order
    n_left = order.maker.batches.n_batches - place.k
    n_wanted = place.count if _is_raw(request, options) else 1
    n = max(1, min(n_wanted, n_left, order.at_once(state_of(request).settings.max_batch)))
    try:
        lease = order.batch(place.epoch, place.k, scope_of(request).client, n)
    except IndexError as error:
        raise LoaderError(str(error)) from error
    return _Asked(store, used, options, lease, n)


@router.get("/v1/stores/{store}/batches", responses=documented(404, 409, 502))
async def describe_order(request: Request, store: StoreName, query: BatchOf) -> OrderDocument:
    """How many rows and batches an epoch has; nothing of them is read."""
    asked = await _asked(request, store, query, None)
    order = asked.used.order
    return OrderDocument(
        n_rows=order.maker.rows.n_valid,
        n_batches=order.maker.batches.n_batches,
        hooks=asked.options.hooks,
        version=order.version,
        identity=order.maker.identity(),
        at_once=order.at_once(state_of(request).settings.max_batch),
    )


@router.get(
    "/v1/stores/{store}/batches/{k}",
    response_class=Response,
    responses=_documented_batch() | documented(404, 406, 409, 416, 502),
    openapi_extra=RANGES,
)
async def batch(
    request: Request, store: StoreName, k: Number, query: Annotated[NumberedQuery, Query()]
) -> Response:
    """Batch k of an epoch, and those after it if they are asked for, in the order of `Store.loader`: raw bytes of one
    hook, else safetensors.

    Whoever asks for the same or for neighbouring batches shares what is read.
    """
    begun = await _asked(request, store, query, Place(query.epoch, k, query.count))
    used, options, lease = begun.used, begun.options, begun.lease
    assert lease is not None
    order = used.order
    try:
        # Many may wait, and none of them holds a thread. Who leaves does not take the batch from the others.
        whole = await asyncio.shield(asyncio.wrap_future(lease.made))
    except asyncio.CancelledError as error:
        if lease.made.cancelled():
            raise given_up() from error
        raise
    finally:
        used.end()
    made = order.part(whole, k, query.rank, query.world_size)
    is_raw = _is_raw(request, options)
    parts = _parts(made, options.hooks[0], lease, begun.store)
    body, headers = _raw(parts) if is_raw else (_safetensors(parts), {})
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
    is_one = options.is_single and not options.provenance
    accept = request.headers.get("Accept", "*/*")
    if RAW in accept and not is_one and SAFETENSORS not in accept:
        raise Problem(
            406,
            "not-acceptable",
            "raw bytes are of one hook without provenance; accept application/x-safetensors",
        )
    return is_one and SAFETENSORS not in accept


@dataclass(frozen=True)
class _Tensor:
    """One of those in a reply."""

    dtype: str
    shape: tuple[int, ...]
    parts: Sequence[Part]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def _parts(made: Made, hook: str, lease: Lease, store: CommittedStore) -> dict[str, _Tensor]:
    """What a batch has, by name."""
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


def _raw(parts: dict[str, _Tensor]) -> tuple[Body, dict[str, str]]:
    (tensor,) = parts.values()
    return Body(tensor.parts), raw_headers(tensor.dtype, tensor.shape)


def _safetensors(parts: dict[str, _Tensor]) -> Body:
    head = safetensors_header(
        [(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in parts.items()]
    )
    return Body([InMemory(head), *(part for tensor in parts.values() for part in tensor.parts)])


def _bytes(tensor: torch.Tensor, lease: Lease) -> InMemory:
    if not tensor.numel():
        return InMemory(b"")
    found = InMemory(tensor.contiguous().view(-1).view(torch.uint8).numpy(), is_counted=True)
    lease.hold_for(found.array)
    return found
