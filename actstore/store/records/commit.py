"""Commit records make shards part of a store. A shard that no record names does not exist.

A segment is committed by `actstore.extraction.computing.segment_commit`: first its shards
(`actstore.store.records.shard_writer`), then the norms of its rows, then the record that names them all.
docs/design/002 has the protocol.
"""

import operator
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Final, Literal

from pydantic import Field

from actstore.errors import StorageError
from actstore.storage.blobs import BlobReader, Blobs, Bytes
from actstore.store.format.document import Document
from actstore.store.format.plan import RUNS, Plan
from actstore.store.format.shard import crc32c
from actstore.store.statistics.hook_statistics import HookStatistics

_READERS: Final = 16
_RECORDS_AT_ONCE: Final = 64

Crc32c = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=0, le=1 << 62)]


def plan_key(run: str) -> str:
    return f"{RUNS}/{run}/plan.json"


def tokens_key(run: str) -> str:
    return f"{RUNS}/{run}/tokens.json"


def commits_folder(run: str) -> str:
    return f"{RUNS}/{run}/commits"


def commit_key(run: str, segment: int) -> str:
    return f"{commits_folder(run)}/{segment:08d}.json"


def columns_folder(run: str) -> str:
    return f"{RUNS}/{run}/columns"


def columns_key(run: str, number: int) -> str:
    """The key of a table of kept columns."""
    return f"{columns_folder(run)}/{number:08d}.parquet"


class ObjectRecord(Document):
    """One object as it is stored."""

    key: str
    nbytes: Count
    crc32c: Crc32c

    def is_of(self, data: Bytes) -> bool:
        """Whether these are the bytes of the recorded object."""
        return (len(data), crc32c(data)) == (self.nbytes, self.crc32c)


class TokensRecord(Document):
    """All token shards are in place, so work can start."""

    format: Literal[1] = 1
    shards: tuple[ObjectRecord, ...]
    tables: tuple[ObjectRecord, ...] = Field(default=(), exclude_if=operator.not_)
    """The Parquet files with the kept columns, in the order of the documents."""


class Environment(Document):
    """The environment of the worker that committed a segment. Values can differ in the last bits between environments;
    shards that the worker adopted may come from an earlier one.
    """

    actstore: str
    engine: Literal["transformers", "imported"]
    """What ran the forward; ``imported`` if none was run, with only the version of the importer."""
    torch: str
    transformers: str
    device: str
    attention: str
    """Attention kernel: ``sdpa``, ``flash_attention_2``, ``eager``, ..."""
    batch: tuple[Count, Count]
    """Sequences and positions of the widest forward of the segment."""


def _is_none(field: object) -> bool:
    """Whether a field is None. Documents of earlier versions lack it, so it is then left out."""
    return field is None


class Golden(Document):
    """A row that was computed again by the plain forward of Hugging Face, in its batch and alone."""

    sequence: Count
    reference: Literal["whole", "loaded"] | None = Field(default=None, exclude_if=_is_none)
    """The model of the plain forward: ``whole`` is the whole model as transformers loads it, ``loaded`` the model that
    captured, with only the layers that the hooks need. It is left out in stores of versions that did not record it,
    which all used the latter.
    """
    errors: dict[str, Annotated[float, Field(ge=0)]]
    """Error by hook, against the row alone: the root mean square, over positions, of the norm of the difference divided
    by that of the plain value, or by the median norm of all positions if that is larger.
    """


class CommitRecord(Document):
    """The record of one complete segment. It does not depend on when or by whom the segment was computed, so equal
    activations make equal records.
    """

    format: Literal[1] = 1
    segment: Count
    n_sequences: int = Field(ge=1, le=1 << 48)
    n_tokens: Count
    """Number of real tokens, without padding."""
    shards: dict[str, ObjectRecord]
    """The shard of each hook, by hook name."""
    norms: ObjectRecord | None = Field(default=None, exclude_if=_is_none)
    """The shard with the norms of all hooks. It is left out of the document if the plan has no norms."""
    statistics: dict[str, HookStatistics]
    """Statistics by hook name; attention scores and patterns have none."""
    golden: Golden | None
    """The golden sequence of segments 0, 64, 128, 256, ...; None for other segments, and for imports. A worker also
    checks the first segment that it computes, whichever that is.
    """
    environment: Environment

    def objects(self, plan: Plan) -> tuple[ObjectRecord, ...]:
        """The shards that this record vouches for, in the order of `Plan.segment_arrays`."""
        acts = (self.shards[name] for name in plan.hook_names)
        return (*acts, *(() if self.norms is None else (self.norms,)))


def has_golden(segment: int) -> bool:
    """Whether the record of a segment holds the errors of its golden sequence: that is so for 0 and the powers of two
    from 64 on. The store thus does not depend on where a worker began, and at most one sequence in 64 segments costs a
    second forward.
    forward.
    """
    return segment == 0 or (segment >= 64 and segment & (segment - 1) == 0)


def committed(blobs: Blobs, plan: Plan) -> set[int]:
    """The numbers of the committed segments, from one listing. Names of other files are ignored."""
    names = blobs.names(commits_folder(plan.run))
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    numbers = {int(stem) for stem in stems if len(stem) == 8 and stem.isascii() and stem.isdecimal()}
    return {index for index in numbers if index < plan.n_segments}


def read_plan(blobs: BlobReader, run: str) -> Plan | None:
    """The plan of a run; None if there is no such run.

    Raises:
        StorageError: the plan is damaged, or that of another run.
    """
    plan = Plan.read_if_there(blobs, plan_key(run))
    if plan is not None and plan.run != run:
        raise StorageError(f"{blobs.url}/{plan_key(run)} is damaged: it is the plan of run {plan.run}")
    return plan


def read_commit(blobs: BlobReader, plan: Plan, segment: int) -> CommitRecord:
    """The record of a committed segment.

    Raises:
        BlobNotFoundError: the segment is not committed.
        StorageError: the record is damaged, or that of another segment.
    """
    key = commit_key(plan.run, segment)
    record = CommitRecord.read(blobs, key)
    problem = mismatch(plan, segment, record)
    if problem is not None:
        raise StorageError(f"{blobs.url}/{key} is damaged: {problem}")
    return record


def read_commits(
    blobs: BlobReader, plan: Plan, segments: Sequence[int]
) -> Generator[CommitRecord, None, None]:
    """The records of some segments, read a few at a time: with statistics they are large, and there can be 100,000.

    Raises:
        StorageError: a record is missing, damaged, or that of another segment.
    """
    with ThreadPoolExecutor(_READERS, thread_name_prefix="records") as threads:
        for start in range(0, len(segments), _RECORDS_AT_ONCE):
            some = segments[start : start + _RECORDS_AT_ONCE]
            yield from threads.map(lambda index: read_commit(blobs, plan, index), some)


def mismatch(plan: Plan, segment: int, record: CommitRecord) -> str | None:
    """Return how the record of a segment contradicts the plan, or None if it does not."""
    planned = plan.segment(segment)
    if (record.segment, record.n_sequences) != (segment, planned.n_sequences):
        return f"it is of segment {record.segment} with {record.n_sequences} sequences"
    keys: Mapping[str, str] = {h.name: plan.activations(h).key(segment) for h in plan.request.hooks}
    if {name: shard.key for name, shard in record.shards.items()} != keys:
        return "its shards are not those of the plan"
    norms = plan.norm_array().key(segment) if plan.norms else None
    if (None if record.norms is None else record.norms.key) != norms:
        return "its norms are not those of the plan"
    return None
