"""What tells the activations of a store from all others."""

import hashlib
from typing import TYPE_CHECKING

from actstore.store.records.commit import TokensRecord, read_commits, tokens_key

if TYPE_CHECKING:
    from actstore.store.records.run import Run
    from actstore.store.store import Store


def contents_id(store: "Store") -> str:
    """Another one for any other bytes of a shard, also if plan and URL are the same.

    A store that was removed and extracted again with other versions of libraries can differ in the last bits. The
    manifest of a sealed store has the checksum of all checksums, so nothing is read; else all records are, once.

    Raises:
        StorageError: a record cannot be read.
    """
    digest = hashlib.sha256()
    for run in store.runs:
        digest.update(run.plan.to_bytes())
        digest.update(_checksums(store, run).encode())
    return digest.hexdigest()


def _checksums(store: "Store", run: "Run") -> str:
    if run.finished is not None:
        return str(run.finished.shards.crc32c)
    found: list[int] = []
    blobs = store.blobs
    if run.has_tokens:
        found += [shard.crc32c for shard in TokensRecord.read(blobs, tokens_key(run.plan.run)).shards]
    for record in read_commits(blobs, run.plan, sorted(run.committed)):
        found += [shard.crc32c for _, shard in sorted(record.shards.items())]
    return str(found)
