"""The plan: what a store will hold, down to the last row, fixed before the first activation is computed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from actstore.store.document import Document
from actstore.store.dtypes import dtype as dtype_of
from actstore.store.layout import ArrayLayout, dividing_chunk_rows

RUN = "0000"
"""Plans and commits are kept by run, so that later runs can add hooks or tokens to a store."""

_TOKEN_SHARD_NBYTES = 16 << 20
"""Part of the format: readers compute the layout of the token arrays from the plan alone."""


class ModelIdentity(Document):
    """Which weights computed the activations."""

    name: str
    """Hub name, or the absolute path of the folder."""
    revision: str | None
    """As asked for: branch, tag or commit on the Hub. The fingerprint says which commit that was."""
    fingerprint: str
    """``hub:<commit>``, or ``crc32c:<config and weight files>`` for a folder."""
    model_type: str
    n_layers: int = Field(ge=1)
    config: dict[str, JsonValue]
    """Hugging Face's configuration of the model, which says what the axes of hooks are."""


class SourceFileIdentity(Document):
    """One file of the token source."""

    name: str
    nbytes: int | None


class TokensIdentity(Document):
    """Which text, tokenised and packed in which way."""

    source: str
    files: tuple[SourceFileIdentity, ...]
    column: str | None
    documents: Literal["file", "paragraph", "line"]
    tokenizer: str | None
    tokenizer_sha256: str | None
    packing: Literal["concat", "document"]
    context_length: int = Field(ge=1)
    begin_batch_token: int | None
    begin_sequence_token: int | None
    separator_token: int | None
    pad_token: int | None
    max_tokens: int | None
    seed: int | None
    """Rows are stored in a permutation drawn from this seed; None keeps the order of the source."""


class HookArray(Document):
    """One hook and the shape of its value at one position."""

    name: str = Field(min_length=1)
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    axes: tuple[str, ...]

    @model_validator(mode="after")
    def _one_axis_each(self) -> Self:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.name} has {len(self.shape)} dimensions and {len(self.axes)} axes")
        return self


class Request(Document):
    """All that decides the bytes of a store. Two runs with equal requests are the same run."""

    model: ModelIdentity
    tokens: TokensIdentity
    hooks: tuple[HookArray, ...] = Field(min_length=1)
    dtype: Literal["bfloat16", "float16", "float32"]
    batch_size: int = Field(ge=1)
    """Sequences in one forward; the last is filled up, so that every forward has the same shape."""

    @model_validator(mode="after")
    def _each_hook_once(self) -> Self:
        names = [hook.name for hook in self.hooks]
        if len(set(names)) != len(names):
            raise ValueError(f"a hook is listed twice in {', '.join(names)}")
        return self


@dataclass(frozen=True, order=True)
class Segment:
    """The unit of work, of commit and of loss: sequences ``start:stop`` of every hook."""

    index: int
    start: int
    stop: int

    @property
    def n_sequences(self) -> int:
        return self.stop - self.start


class Plan(Document):
    """What a run will write. Stored before anything else, and never changed."""

    format: Literal[1] = 1
    request: Request
    n_sequences: int = Field(ge=1)
    n_tokens: int = Field(ge=1)
    """Real tokens, without padding."""
    n_documents: int = Field(ge=1)
    tokens_sha256: str
    """Of all stored rows of token ids, little-endian int32, padding included."""
    segment_size: int = Field(ge=1)

    @property
    def context_length(self) -> int:
        return self.request.tokens.context_length

    @property
    def hook_names(self) -> tuple[str, ...]:
        return tuple(hook.name for hook in self.request.hooks)

    @property
    def n_segments(self) -> int:
        return math.ceil(self.n_sequences / self.segment_size)

    def segment(self, index: int) -> Segment:
        start = index * self.segment_size
        return Segment(index, start, min(start + self.segment_size, self.n_sequences))

    def segments(self) -> Iterator[Segment]:
        return (self.segment(index) for index in range(self.n_segments))

    def activations(self, hook: HookArray) -> ArrayLayout:
        """Layout of a hook's array: [n_sequences, context_length, *hook.shape], one shard a segment."""
        row_nbytes = self.context_length * math.prod(hook.shape) * dtype_of(self.request.dtype).itemsize
        return ArrayLayout(
            path=f"acts/{hook.name}",
            shape=(self.n_sequences, self.context_length, *hook.shape),
            dtype=self.request.dtype,
            axes=("sequence", "position", *hook.axes),
            shard_rows=self.segment_size,
            chunk_rows=dividing_chunk_rows(row_nbytes, self.segment_size),
        )

    def token_arrays(self) -> tuple[ArrayLayout, ...]:
        """Layouts of the arrays that say what each row is, all sharded alike.

        ``tokens`` [N, L] ids; ``lengths`` [N] real tokens in a row; ``documents`` and ``offsets`` [N, L]: the
        document a token came from and its place in it, -1 for tokens that packing put in.
        """
        length = self.context_length
        # 1,024 rows are whole pages whatever the row is.
        shard_rows = 1024 * max(1, _TOKEN_SHARD_NBYTES // (1024 * length * 8))

        def layout(path: str, dtype: str, inner: tuple[int, ...]) -> ArrayLayout:
            row_nbytes = math.prod(inner) * dtype_of(dtype).itemsize
            rows = dividing_chunk_rows(row_nbytes, shard_rows, target_nbytes=1 << 18)
            axes = ("sequence", "position")[: 1 + len(inner)]
            return ArrayLayout(path, (self.n_sequences, *inner), dtype, axes, shard_rows, rows)

        return (
            layout("tokens", "int32", (length,)),
            layout("lengths", "int32", ()),
            layout("documents", "int64", (length,)),
            layout("offsets", "int32", (length,)),
        )

    @property
    def activation_nbytes(self) -> int:
        """Bytes of all shards of all hooks."""
        return sum(self.activations(hook).nbytes for hook in self.request.hooks)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, tokens included; metadata and commit records add a few KB."""
        return self.activation_nbytes + sum(layout.nbytes for layout in self.token_arrays())

    @property
    def n_objects(self) -> int:
        """Files or objects in the finished store."""
        arrays = [*self.token_arrays(), *(self.activations(hook) for hook in self.request.hooks)]
        shards = sum(layout.n_shards for layout in arrays)
        groups = 3
        plan_and_token_record = 2
        return shards + len(arrays) + groups + plan_and_token_record + self.n_segments
