"""Route of single rows that lie anywhere in an array."""

from collections import deque

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from actstore.errors import JobError
from actstore.query.documents import Pick
from actstore.query.picked import Picked
from actstore.query.selection import checked_numbers
from actstore.query.server.routes.parameters import StoreName, array
from actstore.query.server.routes.slices import tensor_responses
from actstore.query.server.sending.body import Body, Stored
from actstore.query.server.sending.error_replies import error_responses
from actstore.query.server.sending.formats import raw_headers
from actstore.query.server.sending.reply import check_size, stream
from actstore.query.server.state import state_of, store_of
from actstore.query.wire import RAW
from actstore.store.committed_store import CommittedStore

router = APIRouter(tags=["activations"])


@router.post(
    "/v1/stores/{store}/rows",
    response_class=Response,
    responses=error_responses(404, 409, 502) | {200: tensor_responses(RAW)[200]},
)
def rows(request: Request, store: StoreName, pick: Pick) -> Response:
    """Single rows of one hook, which lie anywhere: raw bytes in C order, row after row as they are asked for."""
    part = picked(store_of(request, store), pick)
    check_size(part.nbytes, state_of(request).settings.max_reply)
    headers = raw_headers(part.dtype, part.shape)
    return stream(request, Body([Stored(part)]), RAW, tag=None, headers=headers)


def picked(store: CommittedStore, pick: Pick) -> Picked:
    """The rows that a request picks.

    Raises:
        HookError: the store does not hold the hook.
        Problem: a row is out of bounds.
        JobError: there is not one entry for each sequence, or the array has no second axis.
        NotCommittedError: a row is not committed.
    """
    name, stored = array(store, pick.hook)
    if len(stored.shape) == 1:
        raise JobError(f"{name} has one number for each sequence; ask for a slice of it")
    if len(pick.sequences) != len(pick.entries):
        raise JobError(
            f"there are {len(pick.sequences)} sequences and {len(pick.entries)} entries; give one entry for each "
            "sequence"
        )
    sequences = checked_numbers(pick.sequences, stored.shape[0], "sequences")
    entries = checked_numbers(pick.entries, stored.shape[1], "entries")
    if not store.is_complete:
        # This is checked before anything is sent: later, an error could only cut the reply off.
        deque(stored.committed_pieces(np.unique(sequences)), maxlen=0)
    return Picked(name, stored, sequences, entries)
