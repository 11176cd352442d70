"""Checks the shards that are read as a whole against their checksums."""

import threading
from collections.abc import Iterable

from actstore.storage.blobs import Bytes
from actstore.store.format.joined_checksum import joined
from actstore.store.format.layout import ArrayLayout
from actstore.store.format.shard import crc32c, index, indexed
from actstore.store.format.shard_reader import CompressedShards
from actstore.store.reading.checksums import Checksums


class WholeShards:
    """Adds up the checksums of pieces as they are read, in any order, each while it is still in the processor's cache.

    Threads may share one.
    """

    def __init__(
        self, shards: Iterable[tuple[ArrayLayout, int, CompressedShards | None]], checksums: Checksums
    ) -> None:
        """
        Args:
            shards: array and number of each shard, and its reader if it is compressed.
            checksums: checksums of the committed shards.
        """
        self._checksums = checksums
        self._shards = {shard[0].key(shard[1]): shard for shard in shards}
        self._pieces: dict[str, dict[int, tuple[int, int]]] = {key: {} for key in self._shards}
        """Checksum and number of bytes of each piece, by key of its shard and by its first byte."""
        self._lock = threading.Lock()

    def add(self, key: str, start: int, data: Bytes) -> None:
        """Take note of bytes that were read, as they are stored.

        Args:
            key: key of a shard; nothing is done for one that is not read as a whole.
            start: place of the first byte in the object.
            data: bytes that were read.
        """
        if key in self._pieces:
            piece = crc32c(data), len(data)
            with self._lock:
                known = self._pieces[key].get(start)
                if (
                    known is None or known[1] < piece[1]
                ):  # rows of a list may be read again, in shorter pieces
                    self._pieces[key][start] = piece

    def check(self) -> None:
        """Compare all shards with what was committed. This must be called when everything was read.

        Raises:
            StorageError: a shard differs, or its record cannot be read.
        """
        for key, pieces in self._pieces.items():
            if not pieces:
                continue  # a server read and checked it
            n_read = _end(pieces)
            if n_read is None:
                # Other programs may write shards with gaps, and a list of rows may have a row more than once.
                self._checksums.check_once(key)
                continue
            tail = self._tail(key, n_read)
            parts = [pieces[start] for start in sorted(pieces)]
            parts.append((crc32c(tail), len(tail)))
            self._checksums.check(key, n_read + len(tail), joined(parts))
            self._checksums.set_checked(key)

    def _tail(self, key: str, n_read: int) -> bytes:
        """The bytes behind the chunks, or the rows, that were read."""
        layout, shard, compressed = self._shards[key]
        if compressed is not None:
            return indexed(compressed.index(shard))
        return bytes(layout.data_nbytes(shard) - n_read) + index(layout, shard)


def _end(pieces: dict[int, tuple[int, int]]) -> int | None:
    """Where the last piece ends; None if they do not follow each other from the first byte on."""
    end = 0
    for start in sorted(pieces):
        if start != end:
            return None
        end += pieces[start][1]
    return end
