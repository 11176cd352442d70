"""The plan: what a store will hold, down to the last row, fixed before the first activation is computed."""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import FailFast, Field, JsonValue, model_validator

from actstore.hooks.naming.listing import listing
from actstore.store.format.compression import Compression
from actstore.store.format.document import Document
from actstore.store.format.dtypes import dtype as dtype_of
from actstore.store.format.layout import ArrayLayout, dividing_chunk_rows

RUNS = "_actstore/runs"
"""Folder of plans and commits, which are kept by run: later runs add hooks or tokens to a store."""
FIRST_RUN = "0000"
LAST_RUN = "9999"
IMPORTED = "imported:"
"""Prefix of the fingerprint of values that were not computed but imported."""
IN_MEMORY = "memory:"
"""Prefix of the fingerprint of weights that were in memory and in no file."""

RunName = Annotated[str, Field(pattern=r"^[0-9]{4}$")]
MAX_CONTEXT = 1 << 24
"""Most positions of a sequence."""
_TOKEN_SHARD_NBYTES = 16 << 20
"""Bytes of a token shard, as part of the format: readers compute the layout of the token arrays from the plan alone."""


class ModelIdentity(Document):
    """The model whose weights computed the activations."""

    name: str
    """Hub name, or the absolute path of the folder."""
    revision: str | None
    """The requested branch, tag or commit on the Hub. The fingerprint says which commit that was."""
    fingerprint: str
    """``hub:<commit>``, or ``crc32c:<config and weight files>`` for a folder; ``memory:<weights>`` for a model that was
    given in memory; ``imported:<source>:<id>`` if no model was run.
    """
    model_type: str
    n_layers: int = Field(ge=1, le=10_000)
    config: dict[str, JsonValue]
    """Hugging Face's configuration of the model, which says what the axes of hooks are."""

    @property
    def is_imported(self) -> bool:
        """Whether the values were imported, so that they cannot be compared with any weights."""
        return self.fingerprint.startswith(IMPORTED)

    @property
    def was_in_memory(self) -> bool:
        """Whether the model was given in memory, so that no file is known to have its weights."""
        return self.fingerprint.startswith(IN_MEMORY)


def _is_none(field: object) -> bool:
    """Whether a field is None. It is then left out, as documents of earlier versions do not have it."""
    return field is None


class SourceFileIdentity(Document):
    """One file of the token source."""

    name: str
    nbytes: int | None
    crc32c: Annotated[int, Field(ge=0, lt=1 << 32)] | None = Field(default=None, exclude_if=_is_none)
    """CRC-32C of its bytes as they are stored; None if it was not computed, as for large sources."""


class ChatIdentity(Document):
    """How chats are written out as text before they are tokenised."""

    template_sha256: str
    """SHA-256 of the Jinja template, as UTF-8."""
    add_generation_prompt: bool
    """Whether the text ends where the assistant's next message would begin."""
    tools: JsonValue
    """Tools that every chat offers, as the template takes them; null for none."""
    arguments: dict[str, JsonValue]
    """Further arguments of the template."""


class TokensIdentity(Document):
    """The text, and how it is tokenised and packed."""

    source: str
    files: Annotated[tuple[SourceFileIdentity, ...], FailFast()]
    column: str | None
    documents: Literal["file", "paragraph", "line"]
    tokenizer: str | None
    tokenizer_sha256: str | None
    packing: Literal["concat", "document"]
    context_length: int = Field(ge=1, le=MAX_CONTEXT)
    begin_batch_token: int | None
    begin_sequence_token: int | None
    separator_token: int | None
    pad_token: int | None
    max_tokens: int | None
    skip_sequences: int = Field(ge=0, le=1 << 48)
    """Rows at the beginning of the text that are left out, since earlier runs of the store have them."""
    seed: int | None
    """Rows are stored in a permutation drawn from this seed; None keeps the order of the source."""
    chat: ChatIdentity | None = Field(default=None, exclude_if=_is_none)
    """How chats became text; None if documents are no chats. Chats have the arrays of roles and turns."""
    keep: tuple[str, ...] = Field(default=(), exclude_if=operator.not_)
    """Columns of the source that are kept beside the tokens, by document."""
    truncate: Literal["left", "right"] | None = Field(default=None, exclude_if=_is_none)
    """The end at which documents that are longer than a row are cut; None if there must be none. Earlier versions cut
    at the right without saying so.
    """
    positions: str | None = Field(default=None, exclude_if=_is_none)
    """The positions whose activations are stored, as `actstore.tokens.selection` spells them; None for all."""
    token_roles: bool = Field(default=False, exclude_if=operator.not_)
    """Whether the source is token ids, and lists the role and the message of each in its columns roles and turns."""

    @property
    def has_roles(self) -> bool:
        """Whether tokens have roles and turns: those of chats, and of ids that come with them."""
        return self.chat is not None or self.token_roles


class HookArray(Document):
    """One hook and the shape of its value at one position."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=200)
    """Name of the hook. It is part of keys, so it cannot hold anything that leaves its folder."""
    shape: tuple[Annotated[int, Field(ge=1, le=1 << 24)], ...] = Field(max_length=8)
    axes: tuple[str, ...]

    @model_validator(mode="after")
    def _one_axis_each(self) -> Self:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.name} has {len(self.shape)} dimensions and {len(self.axes)} axes")
        return self

    @property
    def has_norms(self) -> bool:
        """Whether the norm of a row is meaningful: not if an axis is itself positions, as in attention patterns, nor if
        the row is a single number.
        """
        return "source_position" not in self.axes and math.prod(self.shape) > 1


class Request(Document):
    """Everything that decides the bytes of a store. Two runs with equal requests are the same run."""

    model: ModelIdentity
    tokens: TokensIdentity
    hooks: Annotated[tuple[HookArray, ...], FailFast()] = Field(min_length=1)
    dtype: Literal["bfloat16", "float16", "float32"]
    batch_size: int = Field(ge=1, le=1 << 24)
    """Sequences in one forward. The last batch of a segment is filled up, so that it has as many as all others."""
    compression: Compression | None
    """Compression of activations, chunk by chunk; None stores them as they are in memory."""
    covariance: bool
    """Whether commit records hold second moments."""
    batching: Literal["length"] | None = Field(default=None, exclude_if=_is_none)
    """``length``: the sequences of a segment are sorted by length into batches, each about as wide as its longest
    sequence; see `actstore.store.format.batches`. None: batches in stored order, as wide as the context.
    """

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
    """What a run will write. It is stored before anything else of the run, and never changed."""

    format: Literal[1] = 1
    run: RunName
    tokens_of: RunName
    """The run whose token arrays describe the rows: this one, or an earlier one to which this one adds hooks."""
    request: Request
    n_sequences: int = Field(ge=1, le=1 << 48)
    n_tokens: int = Field(ge=1, le=1 << 62)
    """Number of real tokens, without padding."""
    n_documents: int = Field(ge=1, le=1 << 62)
    tokens_sha256: str
    """SHA-256 of all stored rows of token ids, little-endian int32, padding included."""
    segment_size: int = Field(ge=1, le=1 << 40)
    n_slots: Annotated[int, Field(ge=1, le=1 << 24)] | None = Field(default=None, exclude_if=_is_none)
    """Slots of a sequence, if only some positions are stored: the most that any of its sequences has. None for all."""
    n_rows: Annotated[int, Field(ge=1, le=1 << 62)] | None = Field(default=None, exclude_if=_is_none)
    """Number of slots in use in all sequences; None if all positions are stored."""
    n_truncated: int = Field(default=0, ge=0, le=1 << 62, exclude_if=operator.not_)
    """Documents that were cut because they are longer than a row."""
    n_tokens_cut: int = Field(default=0, ge=0, le=1 << 62, exclude_if=operator.not_)
    """Tokens that were cut off them."""
    norms: bool = Field(default=False, exclude_if=operator.not_)
    """Whether the norms of the rows are stored, too. If not, the field is left out of the document, as in versions that
    stored no norms.
    """

    @model_validator(mode="after")
    def _norms_of_something(self) -> Self:
        if self.norms and not self.norm_hooks:
            raise ValueError("norms are stored, and no hook has any")
        return self

    @model_validator(mode="after")
    def _slots_of_positions(self) -> Self:
        given = {self.request.tokens.positions is None, self.n_slots is None, self.n_rows is None}
        if len(given) != 1:
            raise ValueError("positions, n_slots and n_rows are either all given or all left out")
        return self

    @model_validator(mode="after")
    def _tokens_come_first(self) -> Self:
        if self.tokens_of > self.run:
            raise ValueError(f"run {self.run} cannot be over the tokens of the later run {self.tokens_of}")
        return self

    @property
    def has_own_tokens(self) -> bool:
        return self.tokens_of == self.run

    @property
    def folder(self) -> str:
        """Folder of the documents of this run."""
        return f"{RUNS}/{self.run}"

    @property
    def part(self) -> str:
        """Path of the group of its arrays: the root, except for runs that added tokens."""
        return "" if self.tokens_of == FIRST_RUN else f"parts/{self.tokens_of}"

    def _path(self, name: str) -> str:
        return f"{self.part}/{name}" if self.part else name

    @property
    def groups(self) -> tuple[str, ...]:
        """Paths of the Zarr groups above its arrays, without the root and the run's own group."""
        above = ("parts", self.part) if self.part else ()
        norms = (self._path("norms"),) if self.norms else ()
        return (*above, self._path("acts"), *norms)

    @property
    def context_length(self) -> int:
        return self.request.tokens.context_length

    @property
    def width(self) -> int:
        """Entries of a sequence in arrays of activations: its slots, or all positions of the context."""
        return self.context_length if self.n_slots is None else self.n_slots

    @property
    def n_stored_rows(self) -> int:
        """Rows of each hook that are in use: chosen positions, or all real tokens."""
        return self.n_tokens if self.n_rows is None else self.n_rows

    @property
    def hook_names(self) -> tuple[str, ...]:
        return tuple(hook.name for hook in self.request.hooks)

    @property
    def hook_listing(self) -> str:
        """The hooks in few words, for messages."""
        return listing(self.hook_names, lambda _: self.request.model.n_layers)

    @property
    def n_segments(self) -> int:
        return math.ceil(self.n_sequences / self.segment_size)

    def segment(self, index: int) -> Segment:
        start = index * self.segment_size
        return Segment(index, start, min(start + self.segment_size, self.n_sequences))

    def segments(self) -> Iterator[Segment]:
        return (self.segment(index) for index in range(self.n_segments))

    def activations(self, hook: HookArray) -> ArrayLayout:
        """Layout of a hook's array, [n_sequences, width, *hook.shape], one shard per segment."""
        row_nbytes = self.width * math.prod(hook.shape) * dtype_of(self.request.dtype).itemsize
        return ArrayLayout(
            path=self._path(f"acts/{hook.name}"),
            shape=(self.n_sequences, self.width, *hook.shape),
            dtype=self.request.dtype,
            axes=("sequence", self._entry_axis, *hook.axes),
            shard_rows=self.segment_size,
            chunk_rows=dividing_chunk_rows(row_nbytes, self.segment_size),
            compression=self.request.compression,
        )

    @property
    def _entry_axis(self) -> str:
        return "position" if self.n_slots is None else "slot"

    @property
    def norm_hooks(self) -> tuple[HookArray, ...]:
        """The hooks whose norms are stored, in stored order; none if norms are not stored."""
        return tuple(hook for hook in self.request.hooks if hook.has_norms)

    def norm_array(self) -> ArrayLayout:
        """Layout of a run's norms, [n_sequences, hooks, width], one shard per segment."""
        inner = (len(self.norm_hooks), self.width)
        return ArrayLayout(
            path=self._path(f"norms/{self.run}"),
            shape=(self.n_sequences, *inner),
            dtype="float32",
            axes=("sequence", "hook", self._entry_axis),
            shard_rows=self.segment_size,
            chunk_rows=dividing_chunk_rows(math.prod(inner) * 4, self.segment_size, target_nbytes=1 << 18),
            hooks=tuple(hook.name for hook in self.norm_hooks),
        )

    def segment_arrays(self) -> tuple[ArrayLayout, ...]:
        """The arrays of which a segment writes a shard, in the order of writing."""
        acts = (self.activations(hook) for hook in self.request.hooks)
        return (*acts, *((self.norm_array(),) if self.norms else ()))

    def arrays(self) -> tuple[ArrayLayout, ...]:
        """The arrays that the run writes, in the order of the table of its shards."""
        return (*(self.token_arrays() if self.has_own_tokens else ()), *self.segment_arrays())

    def token_arrays(self) -> tuple[ArrayLayout, ...]:
        """Layouts of the arrays that describe the rows, all sharded alike.

        They are ``tokens`` [N, L], token ids; ``lengths`` [N], real tokens of each row; ``documents`` and ``offsets``
        [N, L], the document of a token and its index in it, -1 for tokens that packing inserted. Of tokens that have
        them, ``roles`` and ``turns`` [N, L] as well. Where only some positions are stored, ``positions`` [N, n_slots]:
        the position of each slot, ascending, then -1 for slots that a sequence does not use.
        """
        length = self.context_length
        # 1,024 rows fill whole pages, whatever the size of a row.
        shard_rows = 1024 * max(1, _TOKEN_SHARD_NBYTES // (1024 * length * 8))

        def layout(path: str, dtype: str, inner: tuple[int, ...], axis: str = "position") -> ArrayLayout:
            row_nbytes = math.prod(inner) * dtype_of(dtype).itemsize
            rows = dividing_chunk_rows(row_nbytes, shard_rows, target_nbytes=1 << 18)
            axes = ("sequence", axis)[: 1 + len(inner)]
            return ArrayLayout(self._path(path), (self.n_sequences, *inner), dtype, axes, shard_rows, rows)

        labels = (layout("roles", "int8", (length,)), layout("turns", "int32", (length,)))
        return (
            layout("tokens", "int32", (length,)),
            layout("lengths", "int32", ()),
            layout("documents", "int64", (length,)),
            layout("offsets", "int32", (length,)),
            *(labels if self.request.tokens.has_roles else ()),
            *((layout("positions", "int32", (self.n_slots,), "slot"),) if self.n_slots else ()),
        )

    def token_array(self, name: str) -> ArrayLayout:
        """The layout of the token array with this name, such as ``tokens``."""
        return next(layout for layout in self.token_arrays() if layout.path == self._path(name))

    @property
    def activation_nbytes(self) -> int:
        """Bytes of all shards of all hooks."""
        return sum(self.activations(hook).nbytes for hook in self.request.hooks)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, tokens included. Metadata and commit records add a few KB each."""
        return sum(layout.nbytes for layout in self.arrays())

    @property
    def n_objects(self) -> int:
        """Number of files or objects that the run makes; one less if the store has a group of parts already, one more
        if it adds the first norms over tokens of an earlier run.
        """
        arrays = self.arrays()
        shards = sum(layout.n_shards for layout in arrays)
        is_first = self.run == FIRST_RUN
        groups = 2 + len(self.groups) if is_first else len(self.groups) if self.has_own_tokens else 0
        # The plan, the record of the tokens, the two files of the manifest, and the manifest itself.
        documents = 3 + self.has_own_tokens + is_first
        return shards + len(arrays) + groups + documents + self.n_segments
