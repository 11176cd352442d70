"""An id of the bytes of a store, by which the cache tells stores apart."""

import hashlib
from typing import TYPE_CHECKING

from actstore.store.records.commit import TokensRecord, read_commits, tokens_key

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore
    from actstore.store.records.run import Run


def contents_id(store: "CommittedStore") -> str:
    """An id that differs as soon as any byte of a shard does, even if plan and URL are the same.

    A store that was removed and extracted again with other versions of libraries can differ in the last bits. The
    manifest of a sealed store has the checksum of all checksums, so nothing is read; otherwise all records are read
    once.

    Raises:
        StorageError: a record cannot be read.
    """
    digest = hashlib.sha256()
    for run in store.runs:
        digest.update(run.plan.to_bytes())
        digest.update(_checksums(store, run).encode())
    return digest.hexdigest()


def _checksums(store: "CommittedStore", run: "Run") -> str:
    if run.finished is not None:
        return str(run.finished.shards.crc32c)
    checksums: list[int] = []
    blobs = store.blobs
    if run.has_tokens:
        checksums += [shard.crc32c for shard in TokensRecord.read(blobs, tokens_key(run.plan.run)).shards]
    for record in read_commits(blobs, run.plan, sorted(run.committed)):
        checksums += [shard.crc32c for _, shard in sorted(record.shards.items())]
    return str(checksums)
