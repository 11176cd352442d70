"""All packed rows of a store, in a temporary folder until they are written to it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.extraction.planning.tokenising.kept_tables import put_tables
from actstore.storage.blobs import Blobs
from actstore.store.format.dtypes import dtype
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.plan import Plan
from actstore.store.format.shard import encode
from actstore.store.records.commit import ObjectRecord, TokensRecord, tokens_key
from actstore.store.records.shard_writer import put
from actstore.tokens import KeptRows, Spool


@dataclass(frozen=True)
class PackedTokens:
    """All rows of a store in stored order. The files of its spool are deleted with this object."""

    spool: Spool
    permutation: NDArray[np.int64] | None
    seconds: float
    kept: KeptRows | None = None
    """Columns of the source, one row for each document."""

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        values: NDArray[Any] = getattr(self.spool, name)
        return values[start:stop] if self.permutation is None else values[self.permutation[start:stop]]

    def sha256(self) -> str:
        """The SHA-256 of all token rows in stored order, as little-endian int32."""
        if self.permutation is None:
            return self.spool.sha256
        import hashlib

        digest = hashlib.sha256()
        for start in range(0, self.spool.n_sequences, 4096):
            digest.update(np.ascontiguousarray(self.rows("tokens", start, start + 4096), "<i4").data)
        return digest.hexdigest()

    def store(self, blobs: Blobs, plan: Plan) -> None:
        """Write the token arrays and kept columns, then the record that says they are complete.

        Raises:
            StorageError: writing failed, or there are other tokens in their place.
        """
        records = [
            self._put(blobs, layout, shard)
            for layout in plan.token_arrays()
            for shard in range(layout.n_shards)
        ]
        tables = () if self.kept is None else tuple(put_tables(blobs, plan, self.kept))
        blobs.create(tokens_key(plan.run), [TokensRecord(shards=tuple(records), tables=tables).to_bytes()])

    def _put(self, blobs: Blobs, layout: ArrayLayout, shard: int) -> ObjectRecord:
        start = shard * layout.shard_rows
        name = layout.path.rsplit("/", 1)[-1]
        rows = self.rows(name, start, start + layout.rows_in(shard))
        stored = np.zeros(
            (layout.chunks_in(shard) * layout.chunk_rows, *layout.shape[1:]), dtype(layout.dtype).storage
        )
        stored[: len(rows)] = rows
        encoded = encode(layout, shard, stored)
        record = put(blobs, layout, shard, encoded).record
        if record.crc32c != encoded.crc32c:
            raise StorageError(
                f"{blobs.url}/{record.key} holds other tokens than this plan; the store is damaged: run "
                f"`actstore verify {blobs.url} --repair`, then the same command again"
            )
        return record
