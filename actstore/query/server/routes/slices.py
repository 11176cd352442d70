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
from actstore.query.server.routes.accept import Format, preferred_format, slice_format
from actstore.query.server.routes.hot_routes import HotRoute
from actstore.query.server.routes.parameters import (
    HookPath,
    SliceOf,
    SliceQuery,
    StoreName,
    cut,
    cuts,
)
from actstore.query.server.sending.body import Body
from actstore.query.server.sending.error_replies import error_responses
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
        "slots": {**_NUMBERS, "description": "In the place of positions, where only chosen ones are stored."},
        "values": {
            "type": "array",
            "description": "Nested like the axes; NaN and infinities are strings.",
        },
    },
    "required": ["name", "dtype", "shape", "sequences", "positions", "values"],
}


def header(text: str, kind: str = "string") -> dict[str, Any]:
    """The OpenAPI description of a header."""
    return {"description": text, "schema": {"type": kind}}


_HEADERS: Final = {
    "Accept-Ranges": header("Ranges of the bytes are supported."),
    "Cache-Control": header("The bytes may be kept, but must be revalidated with this server."),
    "ETag": header("Tag of these bytes, once the runs of the store are finished."),
}
_SHAPED: Final = {
    "Vary": header("The reply depends on `Accept`."),
    DTYPE: header("Type of the elements of raw bytes, little-endian."),
    SHAPE: header("Sizes of the axes of raw bytes, joined by commas."),
}
_RANGE: Final = {
    "Content-Range": {**header("Range of these bytes, and how many there are in all."), "required": True}
}


def _request_header(name: str, text: str, example: str) -> dict[str, Any]:
    schema = {"type": "string"}
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": text,
        "schema": schema,
        "example": example,
    }


_KNOWN: Final = _request_header(
    "If-None-Match", "ETags that the client has.", '"0123456789abcdef0123456789abcdef"'
)
CONDITIONS: Final = {"parameters": [_KNOWN]}
"""Further OpenAPI parameters of HEAD requests for what `stream` sends."""
RANGES: Final = {
    "parameters": [
        _KNOWN,
        _request_header(
            "Range", "One range of the bytes; for any other value all bytes are sent.", "bytes=0-1023"
        ),
        _request_header(
            "If-Range",
            "ETag for which the range is valid; for another one all bytes are sent.",
            '"0123456789abcdef0123456789abcdef"',
        ),
    ]
}
"""Further OpenAPI parameters of GET requests for what `stream` sends."""


def tensor_responses(*media: str, is_shaped: bool = True) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI description of replies with these media types.

    Args:
        media: media types that a reply can have.
        is_shaped: whether a reply is one array.
    """
    array = {"schema": _ARRAY if is_shaped else {"type": "object"}}
    content = {media_type: array if media_type == JSON else _BINARY for media_type in media}
    headers = _HEADERS | (_SHAPED if is_shaped else {})
    return {
        200: {"description": "The bytes.", "content": content, "headers": headers},
        206: {
            "description": "The requested range of the bytes.",
            "content": {**content, **({JSON: _BINARY} if JSON in media else {})},
            "headers": headers | _RANGE,
        },
        304: {"description": "The client has them already.", "headers": headers},
    }


@router.get(
    "/v1/stores/{store}/hooks/{hook}/slice",
    response_class=Response,
    responses=tensor_responses(*MEDIA.values()) | error_responses(404, 406, 409, 416, 502),
    openapi_extra=RANGES,
)
def slice_of_hook(request: Request, store: StoreName, hook: HookPath, query: SliceOf) -> Response:
    """A part of one hook: raw bytes in C order, or the format that `Accept` or `format` names.

    npy, Arrow and JSON have no bfloat16; they get float32, which holds its values exactly.
    """
    chosen = slice_format(query.format, request.headers.get("Accept"))
    opened = store_of(request, store)
    part = cut(opened, hook, query.seq, query.pos, query.inner)
    check_size(part.nbytes, state_of(request).settings.max_reply)
    headers = raw_headers(part.dtype, part.shape) if chosen == "raw" else {}
    body, held = _body(request, part, chosen)
    return stream(
        request,
        body,
        MEDIA[chosen],
        tag=tag_of(opened, part.text, chosen),
        headers={"Vary": "Accept", **headers},
        held=held,
    )


def _body(request: Request, part: Cut, chosen: str) -> tuple[Body, Account | None]:
    """The body, and the account of its memory if it is made here."""
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
    responses=error_responses(404, 409, 502) | {200: tensor_responses(SAFETENSORS, RAW)[200]},
)
def select(request: Request, store: StoreName, select: Select) -> Response:
    """The same sequences and positions of several hooks in one reply: safetensors; or raw bytes, for one hook, if
    `Accept` says so.
    """
    opened = store_of(request, store)
    parts = cuts(opened, select)
    check_size(sum(part.nbytes for part in parts), state_of(request).settings.max_reply)
    offered: list[Format] = ["safetensors", "raw"] if len(parts) == 1 else ["safetensors"]
    is_raw = preferred_format(request.headers.get("Accept"), offered) == "raw"
    return stream(
        request,
        slice_body(parts[0], "raw") if is_raw else safetensors_body(parts),
        RAW if is_raw else SAFETENSORS,
        tag=None,
        headers=raw_headers(parts[0].dtype, parts[0].shape) if is_raw else {},
    )


def tag_of(store: CommittedStore, *asked: str) -> str | None:
    """The ETag of a reply; None while a run is not finished, as its bytes may still be replaced."""
    identity = _identity(store)
    return None if identity is None else etag(identity, *asked)


@lru_cache(maxsize=256)
def _identity(store: CommittedStore) -> str | None:
    """Identifies all bytes of a finished store. The store object is replaced by a new one when it grows."""
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
