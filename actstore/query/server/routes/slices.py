"""Routes of activations: slices of one hook, and selections of several."""

import re
from functools import lru_cache
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from actstore.query.cut import Cut
from actstore.query.documents import Select
from actstore.query.server.catalog.catalog import NAME
from actstore.query.server.memory.budget import Account
from actstore.query.server.routes.hot_routes import HotRoute
from actstore.query.server.routes.parameters import HookPath, SliceOf, SliceQuery, StoreName, cut, cuts, form
from actstore.query.server.sending.body import Body
from actstore.query.server.sending.error_replies import documented
from actstore.query.server.sending.formats import (
    MEDIA,
    made_nbytes,
    raw_headers,
    safetensors_body,
    slice_body,
)
from actstore.query.server.sending.reply import check_size, etag, hold, stream
from actstore.query.server.state import state_of, store_of
from actstore.query.wire import DTYPE, JSON, RAW, SAFETENSORS, SHAPE
from actstore.store.committed_store import CommittedStore

router = APIRouter(tags=["activations"])

_BINARY: Final[dict[str, Any]] = {"schema": {"type": "string", "format": "binary"}}
_NUMBERS: Final[dict[str, Any]] = {"type": "array", "items": {"type": "integer"}}
_ARRAY: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "dtype": {"type": "string"},
        "shape": _NUMBERS,
        "sequences": _NUMBERS,
        "positions": {"anyOf": [_NUMBERS, {"type": "null"}]},
        "values": {
            "type": "array",
            "description": "Nested like the axes; NaN and infinities are strings.",
        },
    },
    "required": ["name", "dtype", "shape", "sequences", "positions", "values"],
}


def header(text: str, kind: str = "string") -> dict[str, Any]:
    """What OpenAPI says of a header."""
    return {"description": text, "schema": {"type": kind}}


_HEADERS: Final = {
    "Accept-Ranges": header("That there are ranges of the bytes."),
    "Cache-Control": header(
        "That the bytes may be kept, and this server is to be asked whether they still hold."
    ),
    "ETag": header("Of these bytes, once the runs of the store are finished."),
}
_SHAPED: Final = {
    "Vary": header("That `Accept` decides."),
    DTYPE: header("Type of the elements of raw bytes, little-endian."),
    SHAPE: header("Sizes of the axes of raw bytes, joined by commas."),
}
_RANGE: Final = {"Content-Range": {**header("Which bytes these are, and of how many."), "required": True}}


def _asked(name: str, text: str, example: str) -> dict[str, Any]:
    schema = {"type": "string"}
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": text,
        "schema": schema,
        "example": example,
    }


_KNOWN: Final = _asked("If-None-Match", "ETags that the client has.", '"0123456789abcdef0123456789abcdef"')
CONDITIONS: Final = {"parameters": [_KNOWN]}
"""Further parameters, in OpenAPI, of HEAD of what `stream` gives."""
RANGES: Final = {
    "parameters": [
        _KNOWN,
        _asked("Range", "One range of the bytes; of anything else all are sent.", "bytes=0-1023"),
        _asked(
            "If-Range",
            "The ETag for which the range is good; all are sent for another one.",
            '"0123456789abcdef0123456789abcdef"',
        ),
    ]
}
"""The same of GET."""


def tensors(*media: str, is_shaped: bool = True) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of replies with these media types.

    Args:
        media: any of them.
        is_shaped: whether they are of one array.
    """
    array = {"schema": _ARRAY if is_shaped else {"type": "object"}}
    content = {each: array if each == JSON else _BINARY for each in media}
    headers = _HEADERS | (_SHAPED if is_shaped else {})
    return {
        200: {"description": "The bytes.", "content": content, "headers": headers},
        206: {
            "description": "The range of the bytes that was asked for.",
            "content": {**content, **({JSON: _BINARY} if JSON in media else {})},
            "headers": headers | _RANGE,
        },
        304: {"description": "The client has them already.", "headers": headers},
    }


@router.get(
    "/v1/stores/{store}/hooks/{hook}/slice",
    response_class=Response,
    responses=tensors(*MEDIA.values()) | documented(404, 406, 409, 416, 502),
    openapi_extra=RANGES,
)
def slice_of_hook(request: Request, store: StoreName, hook: HookPath, query: SliceOf) -> Response:
    """A part of one hook: raw bytes in C order, or what `Accept` or `format` names.

    npy has no bfloat16 and gets float32, which holds it exactly; so do Arrow and JSON.
    """
    chosen = form(query.format, request.headers.get("Accept"))
    found = store_of(request, store)
    part = cut(found, hook, query.seq, query.pos, query.inner)
    check_size(part.nbytes, state_of(request).settings.max_reply)
    headers = raw_headers(part.dtype, part.shape) if chosen == "raw" else {}
    body, held = _body(request, part, chosen)
    return stream(
        request,
        body,
        MEDIA[chosen],
        tag=tag_of(found, part.text, chosen),
        headers={"Vary": "Accept", **headers},
        held=held,
    )


def _body(request: Request, part: Cut, chosen: str) -> tuple[Body, Account | None]:
    """The body, and what counts its memory if it is made here."""
    nbytes = made_nbytes(part, chosen)
    if not nbytes:
        return slice_body(part, chosen), None
    held = hold(request, nbytes)
    try:
        body = slice_body(part, chosen)
    except BaseException:
        held.close()
        raise
    held.shrink(nbytes - body.held_nbytes, nbytes - body.held_nbytes)
    return body, held


@router.post(
    "/v1/stores/{store}/select",
    response_class=Response,
    responses=documented(404, 409, 502) | {200: tensors(SAFETENSORS, RAW)[200]},
)
def select(request: Request, store: StoreName, select: Select) -> Response:
    """The same sequences and positions of several hooks in one reply: safetensors, or, of one hook, raw bytes if
    `Accept` says so.
    """
    found = store_of(request, store)
    parts = cuts(found, select)
    check_size(sum(part.nbytes for part in parts), state_of(request).settings.max_reply)
    is_raw = len(parts) == 1 and request.headers.get("Accept") == RAW
    return stream(
        request,
        slice_body(parts[0], "raw") if is_raw else safetensors_body(parts),
        RAW if is_raw else SAFETENSORS,
        tag=None,
        headers=raw_headers(parts[0].dtype, parts[0].shape) if is_raw else {},
    )


def tag_of(store: CommittedStore, *asked: str) -> str | None:
    """For the ETag of what was asked for; None while a run is not finished, as other bytes could take its place."""
    identity = _identity(store)
    return None if identity is None else etag(identity, *asked)


@lru_cache(maxsize=256)
def _identity(store: CommittedStore) -> str | None:
    """Another one for any other bytes. The store is the same object until there is more in it."""
    parts = []
    for run in store.runs:
        if run.finished is None:
            return None
        parts += [run.finished.plan.to_bytes().decode(), str(run.finished.shards.crc32c)]
    return etag(*parts)


async def _slice(request: Request, path: dict[str, str], query: SliceQuery) -> Response:
    return await run_in_threadpool(slice_of_hook, request, path["store"], path["hook"], query)


HOT: Final = HotRoute(
    "/v1/stores/{store}/hooks/{hook}/slice",
    re.compile(rf"/v1/stores/(?P<store>{NAME[1:-1]})/hooks/(?P<hook>[^/]{{1,200}})/slice"),
    SliceQuery,
    _slice,
)
