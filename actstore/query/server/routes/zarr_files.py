"""Route of the store as it is: read-only Zarr v3 over HTTP."""

from collections.abc import Iterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from actstore.errors import StorageError
from actstore.query.problem import Problem
from actstore.query.server.catalog.objects import check_readable, consolidated
from actstore.query.server.routes.parameters import StoreName
from actstore.query.server.routes.slices import CONDITIONS, RANGES, tensors
from actstore.query.server.sending.body import Body, InMemory
from actstore.query.server.sending.error_replies import documented
from actstore.query.server.sending.reply import etag, stream
from actstore.query.server.state import store_of
from actstore.query.wire import JSON, RAW
from actstore.storage.blobs import BlobReader, view
from actstore.storage.local import LocalBlobs
from actstore.store.committed_store import CommittedStore

router = APIRouter(tags=["zarr"])

_PIECE_NBYTES: Final = 8 << 20
_ROOT: Final = "zarr.json"
Key = Annotated[
    str, Path(max_length=1000, description="Below the root of the store.", examples=["zarr.json"])
]


class _Blob:
    """An object of the storage as a part of a body."""

    kept_nbytes = 0

    def __init__(self, blobs: BlobReader, key: str, nbytes: int) -> None:
        self._blobs = blobs
        self._key = key
        self.nbytes = nbytes
        self.is_there = False
        # As long as it is no file, which is mapped: the one that is sent, the next one, and the end of the last one.
        self.held_nbytes = 0 if isinstance(blobs, LocalBlobs) else min(nbytes, 3 * _PIECE_NBYTES)

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """As `Part.pieces`."""
        for at in range(start, stop, _PIECE_NBYTES):
            yield view(self._blobs.read(self._key, at, min(_PIECE_NBYTES, stop - at)))


def _documented_head() -> dict[int | str, dict[str, Any]]:
    found = tensors(RAW, JSON, is_shaped=False)
    del found[206]
    return found


@router.api_route(
    "/v1/stores/{store}/zarr/{key:path}",
    methods=["GET"],
    response_class=Response,
    responses=tensors(RAW, JSON, is_shaped=False) | documented(404, 409, 403, 416, 502),
    openapi_extra=RANGES,
)
def object_of_store(request: Request, store: StoreName, key: Key) -> Response:
    """An object of the store: any Zarr v3 reader opens `/v1/stores/{store}/zarr`.

    404 is only for what is missing in a store that is whole; what is not committed yet is 409.
    """
    return _object(request, _served(request, store), key)


@router.head(
    "/v1/stores/{store}/zarr/{key:path}",
    response_class=Response,
    responses=_documented_head() | documented(404, 409, 403, 502),
    openapi_extra=CONDITIONS,
)
def head_of_object(request: Request, store: StoreName, key: Key) -> Response:
    """Size and ETag of an object."""
    return _object(request, _served(request, store), key)


def _served(request: Request, name: str) -> CommittedStore:
    try:
        return store_of(request, name)
    except Problem as problem:
        if problem.kind != "store":
            raise
        # A Zarr reader that is at it when a store, or the right to read it, goes away must not go on with fill values.
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
            # Committed, and gone. A Zarr reader would take "not found" for fill values.
            raise StorageError(f"{key} is committed but missing; the store is damaged")
        raise Problem(404, "not-found", f"there is no object {key[:200]!r} in this store")
    body = Body([_Blob(store.blobs, key, info.nbytes)])
    return stream(request, body, JSON if key.endswith(".json") else RAW, tag=etag(key, info.tag))
