"""Route of plans: what a client reads from storage by itself."""

from collections.abc import Callable, Iterator
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from actstore.errors import JobError
from actstore.query.cut import Cut
from actstore.query.documents import FetchPlan, Place, PlannedArray, PlannedRead, PlanRequest
from actstore.query.problem import Problem
from actstore.query.selection import Indices
from actstore.query.server.catalog.objects import check_readable
from actstore.query.server.routes.parameters import StoreName, cuts
from actstore.query.server.sending.error_replies import documented
from actstore.query.server.sending.reply import document
from actstore.query.server.state import scope_of, state_of, store_of
from actstore.storage.blobs import BlobReader
from actstore.storage.local import LocalBlobs
from actstore.storage.s3 import S3Blobs
from actstore.store.committed_store import CommittedStore

router = APIRouter(tags=["activations"])

_MAX_READS: Final = 100_000
_READS_AT_ONCE: Final = 256
"""Whose memory is counted together."""
_READ_NBYTES: Final = 1_400
"""A read in Python, and as text, twice."""
_PLACE_NBYTES: Final = 5_000
"""A place likewise, with a URL that is signed."""


@router.post("/v1/stores/{store}/plan", response_model=FetchPlan, responses=documented(404, 409, 502))
def plan(request: Request, store: StoreName, asked: PlanRequest) -> Response:
    """Where the bytes of a selection are, for clients that read storage by themselves: S3 objects come with presigned
    URLs. `keys` asks for whole objects, as of compressed arrays, whose chunks only their index knows.
    """
    found = store_of(request, store)
    if (asked.select is None) == (not asked.keys):
        raise JobError("a plan is for either select or keys; give one of them")
    budget, settings = state_of(request).budget, state_of(request).settings
    held = budget.account(scope_of(request).client)

    def hold(nbytes: int) -> None:
        budget.check(held.nbytes + nbytes, "this plan takes", "ask for less at once")
        held.grow(nbytes, nbytes)

    try:
        body = _planned(found, asked, settings.sign_s, hold).model_dump_json().encode()
    finally:
        held.close()
    return document(request, body)


def _planned(
    found: CommittedStore, asked: PlanRequest, sign_s: int, hold: Callable[[int], None]
) -> FetchPlan:
    keys: dict[str, int] = {}
    for key in asked.keys:
        check_readable(found, key)
        keys.setdefault(key, len(keys))
    parts = [] if asked.select is None else cuts(found, asked.select)
    reads: list[PlannedRead] = []
    for number, part in enumerate(parts):
        for key, offset, nbytes, destination in _ranges(part):
            if len(reads) == _MAX_READS:
                raise Problem(
                    413,
                    "too-large",
                    f"the plan would have more than {_MAX_READS} reads; ask for less at once",
                )
            if len(reads) % _READS_AT_ONCE == 0:
                hold(_READS_AT_ONCE * _READ_NBYTES)
            place = keys.setdefault(key, len(keys))
            reads.append(
                PlannedRead(place=place, offset=offset, nbytes=nbytes, array=number, destination=destination)
            )
    hold(len(keys) * _PLACE_NBYTES)
    places = tuple(_place(found.blobs, key, sign_s) for key in keys)
    return FetchPlan(
        expires_s=sign_s if any(place.kind == "http" for place in places) else None,
        places=places,
        arrays=tuple(
            PlannedArray(name=part.name, dtype=part.dtype, shape=part.shape, nbytes=part.nbytes)
            for part in parts
        ),
        reads=tuple(reads),
    )


def _place(blobs: BlobReader, key: str, seconds: int) -> Place:
    if isinstance(blobs, S3Blobs):
        return Place(key=key, url=blobs.signed(key, seconds), kind="http")
    if isinstance(blobs, LocalBlobs):
        return Place(key=key, url=str(blobs.path(key)), kind="file")
    return Place(key=key, url=f"{blobs.url}/{key}", kind="storage")


def _ranges(part: Cut) -> Iterator[tuple[str, int, int, int]]:
    """(key, offset, nbytes, destination) of the bytes of a part, in order."""
    layouts = part.stored.layouts
    if any(layout.compression is not None for layout in layouts):
        raise JobError(
            f"{part.name} is compressed, so only the index of a shard knows where its rows are; ask for keys, or slice"
        )
    whole = [range(size) for size in part.stored.shape[1:]]
    if not all(map(_is_all, part.inner[1:], whole[1:])):
        raise JobError("inner is not part of a plan; read whole positions")
    spans = _spans(part, whole)
    position_nbytes = part.row_nbytes // max(1, len(part.inner[0])) if part.inner else part.row_nbytes
    for piece in part.stored.committed_pieces(part.sequences):
        layout, rows = layouts[piece.section], piece.rows
        key, first = layout.key(rows.shard), rows.start * layout.row_nbytes
        if spans is None:
            yield key, first, rows.n_rows * layout.row_nbytes, piece.at * part.row_nbytes
            continue
        for row in range(rows.n_rows):
            at = (piece.at + row) * part.row_nbytes
            for start, stop in spans:
                nbytes = (stop - start) * position_nbytes
                yield key, first + row * layout.row_nbytes + start * position_nbytes, nbytes, at
                at += nbytes


def _is_all(asked: Indices, whole: range) -> bool:
    return isinstance(asked, range) and asked == whole


def _spans(part: Cut, whole: list[range]) -> list[tuple[int, int]] | None:
    """Neighbouring positions; None if all are wanted."""
    if not part.inner or _is_all(part.inner[0], whole[0]):
        return None
    found: list[tuple[int, int]] = []
    for position in part.inner[0]:
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], int(position) + 1)
        else:
            found.append((int(position), int(position) + 1))
    return found
