"""Route of fetch plans: what a client reads from storage by itself."""

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
from actstore.query.server.sending.error_replies import error_responses
from actstore.query.server.sending.reply import document
from actstore.query.server.state import scope_of, state_of, store_of
from actstore.storage.blobs import BlobReader, are_files
from actstore.store.committed_store import CommittedStore

router = APIRouter(tags=["activations"])

_MAX_READS: Final = 100_000
_READS_AT_ONCE: Final = 256
"""Reads whose memory is counted together."""
_READ_NBYTES: Final = 1_400
"""Bytes of memory for a read: in Python, and twice as text."""
_PLACE_NBYTES: Final = 5_000
"""Bytes of memory for a place: in Python, and twice as text, with a presigned URL."""


@router.post("/v1/stores/{store}/plan", response_model=FetchPlan, responses=error_responses(404, 409, 502))
def plan(request: Request, store: StoreName, wanted: PlanRequest) -> Response:
    """Where the bytes of a selection are, for clients that read storage by themselves: S3 objects come with presigned
    URLs. `keys` names whole objects, as of compressed arrays, whose chunks only their index knows.
    """
    opened = store_of(request, store)
    if (wanted.select is None) == (not wanted.keys):
        raise JobError("a plan is for either select or keys; give one of them")
    budget, settings = state_of(request).budget, state_of(request).settings
    held = budget.account(scope_of(request).client)

    def hold(nbytes: int) -> None:
        budget.check(held.nbytes + nbytes, "this plan takes", "ask for less at once")
        held.grow(nbytes, nbytes)

    try:
        body = _fetch_plan(opened, wanted, settings.sign_s, hold).model_dump_json().encode()
    finally:
        held.close()
    return document(request, body)


def _fetch_plan(
    store: CommittedStore, wanted: PlanRequest, sign_s: int, hold: Callable[[int], None]
) -> FetchPlan:
    keys: dict[str, int] = {}
    for key in wanted.keys:
        check_readable(store, key)
        keys.setdefault(key, len(keys))
    parts = [] if wanted.select is None else cuts(store, wanted.select)
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
    places = tuple(_place(store.blobs, key, sign_s) for key in keys)
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
    signed = blobs.signed(key, seconds)
    if signed is not None:
        return Place(key=key, url=signed, kind="http")
    if are_files(blobs):
        return Place(key=key, url=str(blobs.path(key)), kind="file")
    return Place(key=key, url=f"{blobs.url}/{key}", kind="storage")


def _ranges(part: Cut) -> Iterator[tuple[str, int, int, int]]:
    """Yield (key, offset, nbytes, destination) of the bytes of a part, in order."""
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


def _is_all(indices: Indices, whole: range) -> bool:
    return isinstance(indices, range) and indices == whole


def _spans(part: Cut, whole: list[range]) -> list[tuple[int, int]] | None:
    """Ranges of neighbouring positions; None if all positions are wanted."""
    if not part.inner or _is_all(part.inner[0], whole[0]):
        return None
    spans: list[tuple[int, int]] = []
    for position in part.inner[0]:
        if spans and spans[-1][1] == position:
            spans[-1] = (spans[-1][0], int(position) + 1)
        else:
            spans.append((int(position), int(position) + 1))
    return spans
