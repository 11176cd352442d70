"""The JSON documents of requests and replies."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from actstore.query.selection import INNER_PATTERN, PATTERN
from actstore.store.format.plan import Plan
from actstore.store.records.manifest import FinishedRun
from actstore.store.statistics.hook_statistics import HookStatistics

Axis = Annotated[str, Field(pattern=PATTERN, max_length=100_000, examples=["0:8"])]
Inner = Annotated[str, Field(pattern=INNER_PATTERN, max_length=400, examples=[":"])]
Hook = Annotated[str, Field(min_length=1, max_length=200, examples=["blocks.0.hook_resid_post"])]
Number = Annotated[int, Field(strict=True, ge=-(2**48), le=2**48)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Numbers = Annotated[list[Number], Field(max_length=100_000)]


class Reply(BaseModel):
    """A document that the server sends. Later releases may add fields."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", protected_namespaces=(), use_attribute_docstrings=True
    )


class RequestBody(BaseModel):
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
    """Bytes of the hook at most."""
    has_statistics: bool


class StoreSummary(Reply):
    """A store, in a list of them."""

    name: str
    model: str | None
    """Name of the model; None, like the next fields, if the store cannot be read now."""
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
    """Ranges of segment numbers: start and stop of each."""
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
    """A hash for each run: of its plan and, if it is finished, of the checksum of its shards."""


class HookList(Reply):
    """All hooks of a store, in the order of the forward pass."""

    hooks: tuple[HookDocument, ...]


class StatisticsDocument(Reply):
    """Statistics of a hook over all committed tokens."""

    hook: str
    shape: tuple[int, ...]
    """Shape of the value at one token."""
    summary: dict[str, Any]
    """Count, mean, norms and their quantiles."""
    record: HookStatistics
    """Exact sums, to be merged with others."""


class Select(RequestBody):
    """Parts of several hooks: the same sequences, positions and elements of each."""

    hooks: Annotated[list[Hook], Field(min_length=1, max_length=1000)]
    """Names or globs; also ``tokens``, ``lengths``, ``documents`` and ``offsets``, of chats ``roles`` and ``turns``, of
    chosen positions ``positions``.
    """
    sequences: Axis | Numbers = ":"
    """A slice or numbers as text, or a list of numbers."""
    positions: Axis | Numbers = ":"
    """Positions of the sequences: a slice or numbers as text, or a list of numbers. They are of hooks where all
    positions are stored, and of the arrays of tokens in any store.
    """
    slots: Axis | Numbers | None = None
    """Slots of hooks, and of the array ``positions``, where only chosen positions are stored: a slice or numbers as
    text, or a list of numbers. None for all.
    """
    inner: Inner | None = None
    """A slice or a number for each of the axes behind the positions or slots."""


class Pick(RequestBody):
    """Single rows of one hook, which may lie anywhere."""

    hook: Hook
    """A hook; or an array of the tokens with two axes, such as ``tokens``."""
    sequences: Numbers
    """The sequence of each row."""
    entries: Numbers
    """The position of each row; or its slot, where only chosen positions are stored."""


class PromptsRequest(RequestBody):
    """Prompts whose activations are wanted: either texts or token ids."""

    hooks: Annotated[list[Hook], Field(min_length=1, max_length=1000)]
    """Names or globs of hooks of the model."""
    texts: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=1_000_000)]], Field(min_length=1)] | None
    ) = None
    """Texts; each begins with the BOS token, if the tokenizer of the model has one."""
    tokens: Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)] | None = None
    """The real token ids of each prompt, without padding."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if (self.texts is None) == (self.tokens is None):
            raise ValueError("give either texts or tokens")
        return self


class PlanRequest(RequestBody):
    """What a client wants to read from storage by itself: a selection, or whole objects."""

    select: Select | None = None
    """Parts of arrays that are not compressed."""
    keys: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=1000)] = []
    """Keys of whole objects below the root of the store."""


class PlannedArray(Reply):
    """An array of the selection."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Place(Reply):
    """Location of one object."""

    key: str
    """Key of the object below the root of the store."""
    url: str
    """A client sends GET with Range to it where ``kind`` is ``http``; else it is for clients with access to the
    storage.
    """
    kind: Literal["http", "file", "storage"]


class PlannedRead(Reply):
    """A range of bytes of an object, and where they go in an array."""

    place: int
    """Index into ``places``."""
    offset: int
    nbytes: int
    array: int
    """Index into ``arrays``."""
    destination: int
    """First byte in the array, which is in C order."""


class FetchPlan(Reply):
    """The reads that give the arrays of a selection, or whole objects."""

    expires_s: int | None
    """Seconds for which URLs of the kind ``http`` are valid."""
    places: Annotated[tuple[Place, ...], FailFast()]
    arrays: Annotated[tuple[PlannedArray, ...], FailFast()]
    reads: Annotated[tuple[PlannedRead, ...], FailFast()]


class MatchList(Reply):
    """Sequences and positions at which a text, or token ids, begin."""

    sequences: Annotated[tuple[int, ...], FailFast()]
    positions: Annotated[tuple[int, ...], FailFast()]


class PromptPlaces(Reply):
    """Where the store has prompts, for some hooks."""

    hooks: Annotated[tuple[str, ...], FailFast()]
    """Hooks under their stored names."""
    sequences: Annotated[tuple[int, ...], FailFast()]
    """The sequence of each prompt, in their order."""


class PromptList(Reply):
    """Where the store has the activations of prompts, all of which are committed."""

    lengths: Annotated[tuple[int, ...], FailFast()]
    """Number of tokens of each prompt: its activations are at the first positions of its sequence."""
    places: Annotated[tuple[PromptPlaces, ...], FailFast()]


class OrderDocument(Reply):
    """An order of rows, without any of them."""

    n_rows: int
    """Rows of an epoch, of all ranks together."""
    n_batches: int
    """Batches of an epoch."""
    hooks: tuple[str, ...]
    """Hooks under their stored names."""
    version: str
    """Changes whenever any batch changes. Replies with batches carry it in the header ``Actstore-Order``."""
    identity: dict[str, Any]
    """All that decides which rows are in batch k; part of the state of a loader."""
    at_once: int = Field(1, ge=1)
    """Batches that one request can ask for, as raw bytes."""


class ProblemDocument(Reply):
    """A problem as RFC 9457 defines it."""

    type: str
    title: str
    status: int
    detail: str


class Health(Reply):
    """Reply of a server that answers."""

    status: Literal["ok"]
