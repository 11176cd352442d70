"""Route of searches over tokens."""

import math
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from actstore.analysis.search import BLOCK_NBYTES, search
from actstore.query.documents import MatchList
from actstore.query.server.routes.parameters import StoreName
from actstore.query.server.sending.error_replies import error_responses
from actstore.query.server.sending.reply import document, hold
from actstore.query.server.sharing.scans import Look
from actstore.query.server.state import scope_of, state_of, store_of
from actstore.store.committed_store import CommittedStore

router = APIRouter(tags=["prompts"])

_MATCH_NBYTES: Final = 200
"""Bytes of memory for the numbers of a match, in Python and as text."""


class PromptQuery(BaseModel):
    """What to search for: exactly one of the first three fields."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    text: Annotated[str, Field(max_length=100_000)] | None = None
    """Text, made into tokens by the tokenizer of the store, as it is and with a space in front."""
    tokens: Annotated[str, Field(pattern=r"^-?[0-9]{1,10}(,-?[0-9]{1,10})*$", max_length=100_000)] | None = (
        None
    )
    """Token ids that follow each other, joined by commas."""
    sha: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of all real tokens of a sequence, as little-endian int32."""
    prefix: bool = False
    """Whether to match only where a sequence begins."""
    once: bool = False
    """Whether to give each sequence only once, with the first match in it."""
    limit: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Matches at most."""


@router.get("/v1/stores/{store}/prompts", response_model=MatchList, responses=error_responses(404, 409, 502))
async def find_prompts(
    request: Request, store: StoreName, query: Annotated[PromptQuery, Query()]
) -> Response:
    """Find sequences by text, token ids or hash."""
    state, client = state_of(request), scope_of(request).client
    searched = await run_in_threadpool(store_of, request, store)

    def find(look: Look | None) -> bytes:
        n_most = min(query.limit, math.prod(searched.tokens.shape))
        held = hold(request, n_most * _MATCH_NBYTES + 4 * min(BLOCK_NBYTES, searched.tokens.nbytes))
        try:
            return _search(searched, query, look)
        finally:
            held.close()

    if searched.tokens.nbytes <= BLOCK_NBYTES:
        body = await run_in_threadpool(find, None)
    else:
        body = await state.scans.run(request, client, (id(searched), query.model_dump_json()), find)
    return await run_in_threadpool(document, request, body)


def _search(store: CommittedStore, query: PromptQuery, look: Look | None) -> bytes:
    tokens = None if query.tokens is None else [int(number) for number in query.tokens.split(",")]
    matches = search(store, query.text, tokens, query.sha, query.prefix, query.limit, query.once, look)
    sequences, positions = (tuple(numbers.tolist()) for numbers in matches)
    return MatchList(sequences=sequences, positions=positions).model_dump_json().encode()
