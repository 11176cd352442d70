"""Writing the bytes of a shard into storage, or adopting a shard that is already there."""

from dataclasses import dataclass
from typing import Final

from actstore.errors import StorageError
from actstore.storage.blobs import Blobs
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.shard import Shard, crc32c
from actstore.store.format.shard_reader import decode
from actstore.store.records.commit import ObjectRecord

_CRC32C: Final = "actstore-crc32c"
"""Name of the checksum in the metadata of a shard, where storage keeps metadata."""
_PLAN: Final = "actstore-plan"
"""Name of the checksum of the plan that a shard was written for, in its metadata."""


@dataclass(frozen=True)
class Put:
    """A shard that is in place."""

    record: ObjectRecord
    """The record of the object that is really there."""
    is_own: bool
    """Whether its bytes are those that were to be written, whoever wrote them."""


def put(
    blobs: Blobs, layout: ArrayLayout, index: int, shard: Shard, *, plan_checksum: int | None = None
) -> Put:
    """Write a shard, or adopt the one that is already stored under its name.

    A shard can be there because an earlier attempt was killed before its commit, or because another worker computes the
    same segment. (If our own request succeeded and its reply was lost, `Blobs.create` finds out.) Its bytes are read
    back, and the record describes what is really there: nothing is ever overwritten. A shard of another plan is
    recognised by its metadata; if storage keeps none, the caller must check that an adopted shard has the right values.

    Args:
        blobs: the storage of the store.
        layout: the layout of the array.
        index: the number of the shard.
        shard: the bytes of the shard.
        plan_checksum: the checksum of the plan that it is written for.

    Raises:
        StorageError: the object that is there is no such shard, belongs to another plan, or does not have the checksum
            that its writer recorded.
    """
    metadata = {_CRC32C: str(shard.crc32c)}
    if plan_checksum is not None:
        metadata[_PLAN] = str(plan_checksum)
    own = ObjectRecord(key=shard.key, nbytes=shard.nbytes, crc32c=shard.crc32c)
    if blobs.create(shard.key, shard.parts, metadata=metadata):
        return Put(own, is_own=True)
    present = blobs.read(shard.key)
    present_record = ObjectRecord(key=shard.key, nbytes=len(present), crc32c=crc32c(present))
    if present_record == own:
        return Put(own, is_own=True)
    info = blobs.head(shard.key)
    recorded, planned = (None if info is None else info.metadata.get(name) for name in (_CRC32C, _PLAN))
    try:
        if plan_checksum is not None and planned not in (None, str(plan_checksum)):
            raise StorageError("it was written by a run of another plan")
        if recorded not in (None, str(present_record.crc32c)):
            raise StorageError(f"its crc32c is {present_record.crc32c}, and its writer recorded {recorded}")
        decode(layout, index, present)
    except StorageError as error:
        raise StorageError(
            f"{blobs.url}/{shard.key} was there before and cannot be adopted: {error}; run `actstore verify "
            f"{blobs.url} --repair`, then the same command again"
        ) from error
    return Put(present_record, is_own=False)
