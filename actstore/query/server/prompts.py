"""Route of searches."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from actstore.query.documents import MatchList
from actstore.query.search import search
from actstore.query.server.asked import StoreName
from actstore.query.server.problems import documented
from actstore.query.server.state import store_of

router = APIRouter(tags=["prompts"])


class PromptQuery(BaseModel):
    """What to look for: one of the first three."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    text: Annotated[str, Field(max_length=100_000)] | None = None
    """Made into tokens by the tokenizer of the store, as it is and behind a space."""
    tokens: Annotated[str, Field(pattern=r"^-?[0-9]{1,10}(,-?[0-9]{1,10})*$", max_length=100_000)] | None = (
        None
    )
    """Token ids that follow each other, joined by commas."""
    sha: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of all real tokens of a sequence, as little-endian int32."""
    prefix: bool = False
    """Only where a sequence begins."""
    once: bool = False
    """Each sequence only once, with the first place in it."""
    limit: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Places at most."""


@router.get("/v1/stores/{store}/prompts", responses=documented(404, 409, 502))
def find_prompts(request: Request, store: StoreName, query: Annotated[PromptQuery, Query()]) -> MatchList:
    """Find sequences by text, token ids or hash."""
    tokens = None if query.tokens is None else [int(each) for each in query.tokens.split(",")]
    searched = store_of(request, store)
    found = search(searched, query.text, tokens, query.sha, query.prefix, query.limit, once=query.once)
    return MatchList(sequences=tuple(found.sequences.tolist()), positions=tuple(found.positions.tolist()))
