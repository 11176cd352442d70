"""Commits: the records that make shards part of a store. What no record names does not exist."""

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import Field

from actstore.errors import StorageError
from actstore.storage.blobs import BlobReader, Blobs, Bytes
from actstore.store.format.document import Document
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.plan import RUNS, Plan
from actstore.store.format.shard import Shard, crc32c
from actstore.store.format.shard_reader import decode
from actstore.store.statistics.hook_statistics import HookStatistics

_CRC32C: Final = "actstore-crc32c"
"""Metadata of a shard, where storage has any."""
_PLAN: Final = "actstore-plan"
"""The same: checksum of the plan that it was written for."""

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


class ObjectRecord(Document):
    """One object, as it lies in storage."""

    key: str
    nbytes: Count
    crc32c: Crc32c

    def is_of(self, data: Bytes) -> bool:
        """Whether these are the bytes that were put there."""
        return (len(data), crc32c(data)) == (self.nbytes, self.crc32c)


class TokensRecord(Document):
    """Every token shard is in its place: work can start."""

    format: Literal[1] = 1
    shards: tuple[ObjectRecord, ...]


class Environment(Document):
    """What the worker that committed a segment ran on. Numbers can differ in the last bits from one environment to
    another; shards that it adopted may come from an earlier one.
    """

    actstore: str
    engine: Literal["transformers", "imported"]
    """What ran the forward; ``imported`` where none was run, and then there are no versions but of the importer."""
    torch: str
    transformers: str
    device: str
    attention: str
    """Kernel of attention: ``sdpa``, ``flash_attention_2``, ``eager``, ..."""
    batch: tuple[Count, Count]
    """Sequences and positions of every forward."""


def _is_none(field: object) -> bool:
    """Whether a field is one that earlier versions did not have: their documents are spelled without it."""
    return field is None


class Golden(Document):
    """One row, computed again by the plain forward of Hugging Face, in its batch and alone."""

    sequence: Count
    reference: Literal["whole", "loaded"] | None = Field(default=None, exclude_if=_is_none)
    """What ran the plain forward: ``whole`` for the whole model as transformers loads it, ``loaded`` for the very model
    that captured, with those layers alone that the hooks need. It is left out in stores of versions that did not record
    it, which all used the latter.
    """
    errors: dict[str, Annotated[float, Field(ge=0)]]
    """By hook, against the row alone: root mean square over positions of the difference's norm over that of the plain
    value, or over the median of those of all positions where that is larger.
    """


class CommitRecord(Document):
    """One segment is whole. It holds nothing that depends on when or by whom the segment was computed, so equal
    activations make equal records.
    """

    format: Literal[1] = 1
    segment: Count
    n_sequences: int = Field(ge=1, le=1 << 48)
    n_tokens: Count
    """Real tokens, without padding."""
    shards: dict[str, ObjectRecord]
    """By hook name."""
    norms: ObjectRecord | None = Field(default=None, exclude_if=_is_none)
    """Shard of the norms of all hooks. It is left out of the document where the plan has none."""
    statistics: dict[str, HookStatistics]
    """By hook name; attention scores and patterns have none."""
    golden: Golden | None
    """Of segments 0, 64, 128, 256, ...; None for others, and for all that were imported. A worker checks the first
    segment that it computes anyway.
    """
    environment: Environment

    def objects(self, plan: Plan) -> tuple[ObjectRecord, ...]:
        """Every shard that a record of this plan vouches for, in the order of `Plan.segment_arrays`."""
        acts = (self.shards[name] for name in plan.hook_names)
        return (*acts, *(() if self.norms is None else (self.norms,)))


def has_golden(segment: int) -> bool:
    """Whether the record of a segment holds the errors of its golden row: 0 and the powers of two from 64 on. So what
    the store says does not depend on which worker began where, and at most one row in 64 segments costs a second
    forward.
    """
    return segment == 0 or (segment >= 64 and segment & (segment - 1) == 0)


def committed(blobs: Blobs, plan: Plan) -> set[int]:
    """Numbers of the committed segments, from one listing; names that are no record are passed over."""
    names = blobs.names(commits_folder(plan.run))
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    found = {int(stem) for stem in stems if len(stem) == 8 and stem.isascii() and stem.isdecimal()}
    return {index for index in found if index < plan.n_segments}


def read_plan(blobs: BlobReader, run: str) -> Plan | None:
    """The plan of a run; None if there is no such run.

    Raises:
        StorageError: it is damaged, or that of another run.
    """
    plan = Plan.read_if_there(blobs, plan_key(run))
    if plan is not None and plan.run != run:
        raise StorageError(f"{blobs.url}/{plan_key(run)} is damaged: it is the plan of run {plan.run}")
    return plan


def read_commit(blobs: BlobReader, plan: Plan, segment: int) -> CommitRecord:
    """The record of a committed segment.

    Raises:
        BlobNotFoundError: the segment is not committed.
        StorageError: the record is damaged, or not that of this segment.
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
    """The records of some segments. A few at a time: with statistics they are large, and there can be 100,000.

    Raises:
        StorageError: a record is missing, damaged, or not that of its segment.
    """
    with ThreadPoolExecutor(_READERS, thread_name_prefix="records") as threads:
        for start in range(0, len(segments), _RECORDS_AT_ONCE):
            some = segments[start : start + _RECORDS_AT_ONCE]
            yield from threads.map(lambda index: read_commit(blobs, plan, index), some)


def mismatch(plan: Plan, segment: int, record: CommitRecord) -> str | None:
    """What in the record of a segment contradicts the plan; None if nothing."""
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


@dataclass(frozen=True)
class Put:
    """A shard that is in its place."""

    record: ObjectRecord
    """Of what is really there."""
    is_own: bool
    """Whether its bytes are those that were to be written, whoever wrote them."""


def put(
    blobs: Blobs, layout: ArrayLayout, index: int, shard: Shard, *, plan_checksum: int | None = None
) -> Put:
    """Write a shard, or adopt the one that is already under its name.

    A shard can be there because an earlier attempt was killed before its commit, or because another worker has the
    same segment. (That our own request got through and its reply was lost, `Blobs.create` finds out.) Its bytes are
    read back, and the record describes what is really there: nothing is ever overwritten. A shard of another plan is
    known by its metadata; where storage keeps none, the caller must see that an adopted one has the right values.

    Args:
        blobs: the store.
        layout: the array.
        index: number of the shard.
        shard: its bytes.
        plan_checksum: of the plan that it is written for.

    Raises:
        StorageError: what is there is no such shard, is one of another plan, or has not the checksum that its writer
            gave it.
    """
    metadata = {_CRC32C: str(shard.crc32c)}
    if plan_checksum is not None:
        metadata[_PLAN] = str(plan_checksum)
    own = ObjectRecord(key=shard.key, nbytes=shard.nbytes, crc32c=shard.crc32c)
    if blobs.create(shard.key, shard.parts, metadata=metadata):
        return Put(own, is_own=True)
    present = blobs.read(shard.key)
    found = ObjectRecord(key=shard.key, nbytes=len(present), crc32c=crc32c(present))
    if found == own:
        return Put(own, is_own=True)
    info = blobs.head(shard.key)
    said, planned = (None if info is None else info.metadata.get(name) for name in (_CRC32C, _PLAN))
    try:
        if plan_checksum is not None and planned not in (None, str(plan_checksum)):
            raise StorageError("it was written by a run of another plan")
        if said not in (None, str(found.crc32c)):
            raise StorageError(f"its crc32c is {found.crc32c}, and its writer gave it {said}")
        decode(layout, index, present)
    except StorageError as error:
        raise StorageError(
            f"{blobs.url}/{shard.key} was there before and cannot be taken over: {error}; run `actstore verify "
            f"{blobs.url} --repair`, then the same command again"
        ) from error
    return Put(found, is_own=False)
