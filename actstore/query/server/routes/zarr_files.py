"""Route of the objects of a store: read-only Zarr v3 over HTTP."""

from collections.abc import Iterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from actstore.errors import StorageError
from actstore.query.problem import Problem
from actstore.query.server.catalog.objects import check_readable, consolidated
from actstore.query.server.routes.parameters import StoreName
from actstore.query.server.routes.slices import CONDITIONS, RANGES, tensor_responses
from actstore.query.server.sending.body import Body, InMemory
from actstore.query.server.sending.error_replies import error_responses
from actstore.query.server.sending.reply import etag, stream
from actstore.query.server.state import store_of
from actstore.query.wire import JSON, RAW
from actstore.storage.blobs import BlobReader, view
from actstore.store.committed_store import CommittedStore

router = APIRouter(tags=["zarr"])

_PIECE_NBYTES: Final = 8 << 20
_ROOT: Final = "zarr.json"
Key = Annotated[
    str, Path(max_length=1000, description="Key below the root of the store.", examples=["zarr.json"])
]


class _Blob:
    """An object of the storage as a `Part` of a body."""

    kept_nbytes = 0

    def __init__(self, blobs: BlobReader, key: str, nbytes: int) -> None:
        self._blobs = blobs
        self._key = key
        self.nbytes = nbytes
        self.is_ready = False
        # Files are mapped. Else: the piece being sent, the next one, and the end of the last one.
        self.held_nbytes = 0 if blobs.is_local else min(nbytes, 3 * _PIECE_NBYTES)

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """Implements `Part.pieces`."""
        for at in range(start, stop, _PIECE_NBYTES):
            yield view(self._blobs.read(self._key, at, min(_PIECE_NBYTES, stop - at)))


def _head_responses() -> dict[int | str, dict[str, Any]]:
    responses = tensor_responses(RAW, JSON, is_shaped=False)
    del responses[206]
    return responses


@router.api_route(
    "/v1/stores/{store}/zarr/{key:path}",
    methods=["GET"],
    response_class=Response,
    responses=tensor_responses(RAW, JSON, is_shaped=False) | error_responses(404, 409, 403, 416, 502),
    openapi_extra=RANGES,
)
def object_of_store(request: Request, store: StoreName, key: Key) -> Response:
    """An object of the store: any Zarr v3 reader opens `/v1/stores/{store}/zarr`.

    404 means that a whole store has no such object; an object that is not committed yet gives 409.
    """
    return _object(request, _store_of(request, store), key)


@router.head(
    "/v1/stores/{store}/zarr/{key:path}",
    response_class=Response,
    responses=_head_responses() | error_responses(404, 409, 403, 502),
    openapi_extra=CONDITIONS,
)
def head_of_object(request: Request, store: StoreName, key: Key) -> Response:
    """Size and ETag of an object."""
    return _object(request, _store_of(request, store), key)


def _store_of(request: Request, name: str) -> CommittedStore:
    try:
        return store_of(request, name)
    except Problem as problem:
        if problem.kind != "store":
            raise
        # If a store, or the right to read it, goes away, a Zarr reader must not read fill values instead.
        raise Problem(403, "store", str(problem)) from problem


def _object(request: Request, store: CommittedStore, key: str) -> Response:
    check_readable(store, key)
    if key == _ROOT:
        data = consolidated(store)
        return stream(request, Body([InMemory(data)]), JSON, tag=etag(data.decode()))
    info = store.blobs.head(key)
    if info is None:
        is_shard = not key.endswith((".json", ".parquet"))
        if is_shard:
            # A Zarr reader would take "not found" for fill values.
            raise StorageError(f"{key} is committed but missing; the store is damaged")
        raise Problem(404, "not-found", f"there is no object {key[:200]!r} in this store")
    body = Body([_Blob(store.blobs, key, info.nbytes)])
    return stream(request, body, JSON if key.endswith(".json") else RAW, tag=etag(key, info.tag))
