"""Routes of batches."""

import asyncio
from concurrent.futures import Future
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Path, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from actstore.errors import LoaderError
from actstore.loader.batch import Batch, Values
from actstore.loader.options import LoaderOptions, options_of
from actstore.query.documents import OrderDocument
from actstore.query.problem import Problem
from actstore.query.selection import numbers
from actstore.query.server.asked import BatchOf, BatchQuery, StoreName
from actstore.query.server.batches import Order, given_up, nbytes_of
from actstore.query.server.body import Body, InMemory
from actstore.query.server.formats import raw_headers, safetensors_header
from actstore.query.server.problems import documented
from actstore.query.server.reply import check_size, stream
from actstore.query.server.slices import RANGES, header, tag_of, tensors
from actstore.query.server.state import state_of, store_of
from actstore.query.wire import N_BATCHES, ORDER, POSITIONS, RAW, SAFETENSORS, SEQUENCES, TOKENS
from actstore.store.store import Store

router = APIRouter(tags=["training"])

Number = Annotated[int, Path(ge=0, le=1 << 62, description="Number of the batch in its epoch.")]


class NumberedQuery(BatchQuery):
    """An order of rows, and an epoch."""

    epoch: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    """Each has an order of its own."""


def _documented_batch() -> dict[int | str, dict[str, Any]]:
    found = tensors(RAW, SAFETENSORS)
    for each in found.values():
        each["headers"] = {
            **each["headers"],
            N_BATCHES: header("Batches of an epoch.", "integer"),
            ORDER: header("Another one where any batch of the order is another one."),
        }
    return found


def _options(request: Request, store: Store, query: BatchQuery) -> LoaderOptions:
    """
    Raises:
        HookError: a hook is not stored.
        Problem: there is no such position.
        LoaderError: an option that cannot be.
    """
    settings = state_of(request).settings
    positions = None if query.seqpos == ":" else list(numbers(query.seqpos, store.shape[1], "seqpos"))
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


def _order(request: Request, store: Store, query: BatchQuery) -> tuple[Order, LoaderOptions]:
    options = _options(request, store, query)
    # The whole batch is made, also for a rank.
    check_size(nbytes_of(store, options), state_of(request).settings.max_batch)
    if not store.is_complete:
        for hook in options.hooks:
            store[hook].rows.check_committed()
    return state_of(request).batches.order(store, options), options


@router.get("/v1/stores/{store}/batches", responses=documented(404, 409, 502))
def describe_order(request: Request, store: StoreName, query: BatchOf) -> OrderDocument:
    """How many rows and batches an epoch has; nothing of them is read."""
    order, options = _order(request, store_of(request, store), query)
    return OrderDocument(
        n_rows=order.maker.rows.n_valid,
        n_batches=order.maker.batches.n_batches,
        hooks=options.hooks,
        version=order.version,
        identity=order.maker.identity(),
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
    """Batch k of an epoch, in the order of `Store.loader`: raw bytes of one hook, else safetensors.

    Whoever asks for the same or for neighbouring batches shares what is read.
    """
    found, order, options, begun = await run_in_threadpool(_begun, request, store, k, query)
    try:
        # Many may wait, and none of them holds a thread. Who leaves does not take the batch from the others.
        whole = await asyncio.shield(asyncio.wrap_future(begun))
    except asyncio.CancelledError as error:
        if begun.cancelled():
            raise given_up() from error
        raise
    made = order.part(whole, k, query.rank, query.world_size)
    is_raw = _is_raw(request, options)
    body, headers = _raw(made) if is_raw else (_safetensors(made, options.hooks[0]), {})
    asked = (query.model_dump_json(), str(k), "raw" if is_raw else "safetensors")
    return stream(
        request,
        body,
        RAW if is_raw else SAFETENSORS,
        tag=tag_of(found, *asked),
        headers={
            N_BATCHES: str(order.maker.batches.n_batches),
            ORDER: order.version,
            "Vary": "Accept",
            **headers,
        },
    )


def _begun(
    request: Request, name: str, k: int, query: NumberedQuery
) -> "tuple[Store, Order, LoaderOptions, Future[Values | Batch]]":
    store = store_of(request, name)
    order, options = _order(request, store, query)
    _is_raw(request, options)  # or it is not acceptable, before anything is read
    try:
        return store, order, options, order.batch(query.epoch, k)
    except IndexError as error:
        raise LoaderError(str(error)) from error


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


def _raw(made: Values | Batch) -> tuple[Body, dict[str, str]]:
    assert isinstance(made, torch.Tensor)
    return Body([_bytes(made)]), raw_headers(_name(made), made.shape)


def _safetensors(made: Values | Batch, hook: str) -> Body:
    values = made.values if isinstance(made, Batch) else made
    named = dict(values) if isinstance(values, dict) else {hook: values}
    if isinstance(made, Batch):
        named |= {SEQUENCES: made.sequences, POSITIONS: made.positions, TOKENS: made.tokens}
    head = safetensors_header(
        [(name, _name(each), tuple(each.shape), each.nbytes) for name, each in named.items()]
    )
    return Body([InMemory(head), *map(_bytes, named.values())])


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: torch.Tensor) -> InMemory:
    if not tensor.numel():
        return InMemory(b"")
    return InMemory(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data))
