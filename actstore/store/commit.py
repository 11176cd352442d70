"""Commits: the records that make shards part of a store. What no record names does not exist."""

from typing import Literal

from pydantic import Field

from actstore.errors import StorageError
from actstore.store.blobs import BlobNotFoundError, Blobs
from actstore.store.document import Document
from actstore.store.plan import RUN, Plan
from actstore.store.shard import Shard, crc32c

PLAN_KEY = f"_actstore/runs/{RUN}/plan.json"
TOKENS_KEY = f"_actstore/runs/{RUN}/tokens.json"
COMMITS = f"_actstore/runs/{RUN}/commits"


class ShardRecord(Document):
    """One object, as it lies in storage."""

    key: str
    nbytes: int = Field(ge=0)
    crc32c: int = Field(ge=0, lt=2**32)


class TokensRecord(Document):
    """Every token shard is in its place: work can start."""

    format: Literal[1] = 1
    shards: tuple[ShardRecord, ...]


class Environment(Document):
    """What the worker that committed a segment ran on. Numbers can differ in the last bits from one environment to
    another; shards that it adopted may come from an earlier one.
    """

    actstore: str
    torch: str
    transformers: str
    device: str
    attention: str


class CommitRecord(Document):
    """One segment is whole. It holds nothing that depends on when or by whom the segment was computed, so equal
    activations make equal records.
    """

    format: Literal[1] = 1
    segment: int = Field(ge=0)
    n_sequences: int = Field(ge=1)
    shards: dict[str, ShardRecord]
    """By hook name."""
    environment: Environment


def commit_key(segment: int) -> str:
    return f"{COMMITS}/{segment:08d}.json"


def committed(blobs: Blobs, n_segments: int) -> set[int]:
    """Numbers of the committed segments, from one listing; names that are no record are passed over."""
    stems = (name.removesuffix(".json") for name in blobs.names(COMMITS) if name.endswith(".json"))
    found = {int(stem) for stem in stems if len(stem) == 8 and stem.isdecimal()}
    return {index for index in found if index < n_segments}


def read_plan(blobs: Blobs) -> Plan | None:
    """The plan of the store below this URL; None if there is no store."""
    try:
        data = bytes(blobs.read(PLAN_KEY))
    except BlobNotFoundError:
        return None
    return Plan.from_bytes(data, f"{blobs.url}/{PLAN_KEY}")


def read_commit(blobs: Blobs, segment: int) -> CommitRecord:
    """The record of a committed segment."""
    key = commit_key(segment)
    return CommitRecord.from_bytes(bytes(blobs.read(key)), f"{blobs.url}/{key}")


def put(blobs: Blobs, shard: Shard) -> ShardRecord:
    """Write a shard, or adopt the one that is already under its name.

    A shard can be there because an earlier attempt was killed before its commit, because our own request got
    through and its reply was lost, or because another worker has the same segment. Its bytes are read back in
    all three cases, and the record describes what is really there: nothing is ever overwritten.

    Raises:
        StorageError: what is there has the wrong size; it is damaged.
    """
    if blobs.create(shard.key, shard.parts):
        return ShardRecord(key=shard.key, nbytes=shard.nbytes, crc32c=shard.crc32c)
    present = blobs.read(shard.key)
    nbytes = len(present)
    if nbytes != shard.nbytes:
        raise StorageError(
            f"{blobs.url}/{shard.key} has {nbytes} bytes where {shard.nbytes} were expected, so it is not "
            "from this run; delete it and run the same command again"
        )
    return ShardRecord(key=shard.key, nbytes=nbytes, crc32c=crc32c(present))
