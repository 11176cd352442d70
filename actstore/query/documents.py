"""The JSON of requests and replies."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from actstore.query.selection import INNER_PATTERN, PATTERN
from actstore.store.format.plan import Plan
from actstore.store.records.manifest import FinishedRun
from actstore.store.statistics.hook_statistics import HookStatistics

Axis = Annotated[str, Field(pattern=PATTERN, max_length=100_000, examples=["0:8"])]
Inner = Annotated[str, Field(pattern=INNER_PATTERN, max_length=400, examples=[":"])]
Hook = Annotated[str, Field(min_length=1, max_length=200, examples=["blocks.0.hook_resid_post"])]
Number = Annotated[int, Field(strict=True, ge=-(2**48), le=2**48)]
Numbers = Annotated[list[Number], Field(max_length=100_000)]


class Reply(BaseModel):
    """A document that the server sends. Later releases may add fields."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", protected_namespaces=(), use_attribute_docstrings=True
    )


class Asked(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )


class HookDocument(Reply):
    """A stored hook."""

    name: str
    shape: tuple[int, ...]
    """Sequences, positions, and the axes of the hook."""
    axes: tuple[str, ...]
    dtype: str
    nbytes: int
    """The most that it takes."""
    has_statistics: bool


class StoreSummary(Reply):
    """A store, in a list of them."""

    name: str
    model: str | None
    """None, like the next fields, if it cannot be read now."""
    shape: tuple[int, int] | None
    """Sequences and positions."""
    n_hooks: int | None
    is_complete: bool | None
    problem: str | None
    """Why it cannot be read."""


class StoreList(Reply):
    """All stores that this client may read."""

    stores: tuple[StoreSummary, ...]


class RunDocument(Reply):
    """One run of a store, and what of it is committed."""

    plan: Plan
    committed: Annotated[tuple[tuple[int, int], ...], FailFast()]
    """Ranges of numbers of segments, start and stop."""
    has_tokens: bool
    finished: FinishedRun | None


class StoreDocument(Reply):
    """A store: enough to compute where each of its bytes is."""

    name: str
    model: str
    shape: tuple[int, int]
    """Sequences and positions."""
    dtype: str
    n_tokens: int
    n_segments: int
    n_segments_committed: int
    is_complete: bool
    hooks: Annotated[tuple[str, ...], FailFast()]
    runs: Annotated[tuple[RunDocument, ...], FailFast()]
    contents: Annotated[tuple[str, ...], FailFast()]
    """Of each run: its plan, and the checksum of its shards if it is finished, as hashes."""


class HookList(Reply):
    """All hooks of a store, in the order of the forward."""

    hooks: tuple[HookDocument, ...]


class StatisticsDocument(Reply):
    """Statistics of a hook over all committed tokens."""

    hook: str
    shape: tuple[int, ...]
    """Of the value at one token."""
    summary: dict[str, Any]
    """Count, mean, norms and their quantiles."""
    record: HookStatistics
    """Exact sums, to be merged with others."""


class Select(Asked):
    """Parts of several hooks: the same sequences, positions and elements of each."""

    hooks: Annotated[list[Hook], Field(min_length=1, max_length=1000)]
    """Names or globs; also ``tokens``, ``lengths``, ``documents`` and ``offsets``."""
    sequences: Axis | Numbers = ":"
    """A slice or numbers as text, or a list of numbers."""
    positions: Axis | Numbers = ":"
    """Likewise."""
    inner: Inner | None = None
    """Of the axes behind the positions: a slice or a number for each."""


class PlanRequest(Asked):
    """What a client wants to read from storage by itself: a selection, or whole objects."""

    select: Select | None = None
    """Parts of arrays that are not compressed."""
    keys: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=1000)] = []
    """Of whole objects below the root of the store."""


class PlannedArray(Reply):
    """An array of the selection."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Place(Reply):
    """Where an object is."""

    key: str
    """Below the root of the store."""
    url: str
    """To be asked for with GET and Range where ``kind`` is ``http``; else for a client with access to the storage."""
    kind: Literal["http", "file", "storage"]


class PlannedRead(Reply):
    """Bytes of an object, and where they go."""

    place: int
    """Number in ``places``."""
    offset: int
    nbytes: int
    array: int
    """Number in ``arrays``."""
    destination: int
    """First byte in the array, which is in C order."""


class FetchPlan(Reply):
    """What to read, and where."""

    expires_s: int | None
    """Seconds for which URLs of the kind ``http`` are good."""
    places: Annotated[tuple[Place, ...], FailFast()]
    arrays: Annotated[tuple[PlannedArray, ...], FailFast()]
    reads: Annotated[tuple[PlannedRead, ...], FailFast()]


class MatchList(Reply):
    """Where a text, or token ids, begin."""

    sequences: Annotated[tuple[int, ...], FailFast()]
    positions: Annotated[tuple[int, ...], FailFast()]


class OrderDocument(Reply):
    """An order of rows, without any of them."""

    n_rows: int
    """Of an epoch, all ranks together."""
    n_batches: int
    """Of an epoch."""
    hooks: tuple[str, ...]
    """Under their stored names."""
    version: str
    """Another one where any batch is another one. Replies with batches have it in the header ``Actstore-Order``."""
    identity: dict[str, Any]
    """All that decides which rows are in batch k; part of the state of a loader."""
    at_once: int = Field(1, ge=1)
    """Batches that can be asked for in one request, as raw bytes."""


class ProblemDocument(Reply):
    """What went wrong, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str


class Health(Reply):
    """That the server answers."""

    status: Literal["ok"]
