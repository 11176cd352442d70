"""Size and checksum of each shard as it was committed, from the records, which are read at the first use."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.storage.blobs import BlobReader
from actstore.storage.pinned import check_version
from actstore.store.format.plan import Plan
from actstore.store.format.shard import crc32c
from actstore.store.reading.sections import PIECE_NBYTES
from actstore.store.records.commit import ObjectRecord, TokensRecord, read_commit, tokens_key
from actstore.store.records.run import Run

_MAX_KEPT: Final = 1 << 16
"""Number of checksums of unfinished runs that are kept in memory; others are read again."""


@dataclass(frozen=True)
class Checksum:
    """Size in bytes and checksum of a shard as it was committed."""

    nbytes: int
    crc32c: int


class Checksums:
    """The checksums of all shards of a store, by key. Threads may share one.

    Those of a finished run are in one file, whose checksum is in the manifest; those of other runs are in their commit
    records.
    """

    def __init__(self, blobs: BlobReader, runs: tuple[Run, ...]) -> None:
        """
        Args:
            blobs: storage, pinned to the version that has these runs, or blobs of a server.
            runs: all runs of the store.
        """
        self._blobs = blobs
        self._runs = runs
        self._lock = threading.Lock()
        self._tables: dict[str, dict[str, _Column]] = {}
        self._kept: dict[str, Checksum] = {}
        self._was_checked: set[str] = set()

    @cached_property
    def _arrays(self) -> dict[str, Run]:
        """The run that wrote each array, by path of the array."""
        runs: dict[str, Run] = {}
        for run in self._runs:
            runs |= dict.fromkeys(_n_shards(run.plan), run)
        return runs

    def __getitem__(self, key: str) -> Checksum:
        """The checksum of a shard.

        Raises:
            StorageError: the record is missing, damaged, or cannot be read.
        """
        path, _, name = key.rpartition("/")
        shard, run = int(name.split(".")[1]), self._arrays[path]
        if run.finished is not None:
            column = self._table(run)[path]
            return Checksum(int(column.nbytes[shard]), int(column.crc32c[shard]))
        with self._lock:
            kept = self._kept.get(key)
        if kept is not None:
            return kept
        # Read without the lock: other threads need not wait for it, and a process may be forked meanwhile.
        recorded = self._recorded(run.plan, path, shard)
        with self._lock:
            if len(self._kept) >= _MAX_KEPT:
                self._kept = {}
            self._kept |= recorded
        if key not in recorded:
            raise StorageError(
                f"{self._blobs.url} is damaged: the records of run {run.plan.run} do not name {key}; run `actstore "
                f"verify {self._blobs.url} --repair`, then the extraction again"
            )
        return recorded[key]

    def check(self, key: str, nbytes: int, checksum: int) -> None:
        """Compare a shard that was read as a whole with the one that was committed.

        Raises:
            StorageError: they differ.
        """
        expected = self[key]
        if (nbytes, checksum) != (expected.nbytes, expected.crc32c):
            check_version(self._blobs)
            raise StorageError(
                f"{self._blobs.url}/{key} has {nbytes} bytes and crc32c {checksum} where {expected.nbytes} and "
                f"{expected.crc32c} were committed; it is damaged or was replaced: run `actstore verify "
                f"{self._blobs.url}`"
            )

    def was_checked(self, key: str) -> bool:
        """Whether a shard is known to be right, by `set_checked` or `check_once`."""
        return key in self._was_checked

    def set_checked(self, key: str) -> None:
        """Take note that a shard is known to be right."""
        self._was_checked.add(key)

    def check_once(self, key: str) -> None:
        """Read a shard as a whole and compare it with the one that was committed, unless that was done before.

        Raises:
            StorageError: they differ, or the shard cannot be read.
        """
        if key in self._was_checked:
            return
        for _ in self.checked_pieces(self._blobs, key, self[key].nbytes):
            pass
        self.set_checked(key)

    def checked_pieces(self, blobs: BlobReader, key: str, nbytes: int) -> Iterator[NDArray[np.uint8]]:
        """The pieces of a shard, see `pieces_of`, which are compared with what was committed after the last one.

        Args:
            blobs: where the shard is read from.
            key: key of the shard.
            nbytes: size of the shard in bytes.

        Raises:
            StorageError: the shard is not what was committed, or cannot be read.
        """
        checksum = 0
        for piece in pieces_of(blobs, key, nbytes):
            checksum = crc32c(piece, checksum)
            yield piece
        self.check(key, nbytes, checksum)

    def _table(self, run: Run) -> "dict[str, _Column]":
        name = run.plan.run
        with self._lock:
            table = self._tables.get(name)
        if table is None:
            table = _read_table(self._blobs, run)
            with self._lock:
                self._tables[name] = table
        return table

    def _recorded(self, plan: Plan, path: str, shard: int) -> dict[str, Checksum]:
        if path in _token_paths(plan):
            shards = TokensRecord.read(self._blobs, tokens_key(plan.run)).shards
            return {blob.key: Checksum(blob.nbytes, blob.crc32c) for blob in shards}
        record = read_commit(self._blobs, plan, shard)
        return {blob.key: Checksum(blob.nbytes, blob.crc32c) for blob in record.objects(plan)}


def pieces_of(blobs: BlobReader, key: str, nbytes: int) -> Iterator[NDArray[np.uint8]]:
    """All bytes of a blob in order, in pieces of up to `PIECE_NBYTES`, each in the memory of the one before.

    Raises:
        StorageError: the blob cannot be read.
    """
    memory = np.empty(min(PIECE_NBYTES, nbytes), np.uint8)
    for start in range(0, nbytes, PIECE_NBYTES):
        piece = memory[: nbytes - start]
        blobs.read_into(key, start, piece)
        yield piece


@dataclass(frozen=True)
class _Column:
    """Sizes and checksums of the shards of one array, [n_shards] each."""

    nbytes: NDArray[np.int64]
    crc32c: NDArray[np.uint32]


def _token_paths(plan: Plan) -> Mapping[str, int]:
    layouts = plan.token_arrays() if plan.has_own_tokens else ()
    return {layout.path: layout.n_shards for layout in layouts}


def _n_shards(plan: Plan) -> dict[str, int]:
    """Number of shards of each array that a run writes, by path, in the order of the table of its shards."""
    return {layout.path: layout.n_shards for layout in plan.arrays()}


def _read_table(blobs: BlobReader, run: Run) -> dict[str, _Column]:
    """Read the table of shards of a finished run; columns are by path of the array.

    Raises:
        StorageError: the table is not the one that the manifest names.
    """
    # Imported late: the import takes a fifth of a second, and many readers need no checksum.
    from actstore.store.records.shards_table import of_plan

    assert run.finished is not None
    record: ObjectRecord = run.finished.shards
    data = bytes(blobs.read(record.key))
    where = f"{blobs.url}/{record.key}"
    if not record.is_of(data):
        raise StorageError(
            f"{where} is not the table that the manifest names; it is damaged: run `actstore verify {blobs.url} "
            "--repair`"
        )
    counts = _n_shards(run.plan)
    table: Any = of_plan(data, run.plan)
    nbytes, checksums = (table[name].to_numpy() for name in ("nbytes", "crc32c"))
    columns, start = {}, 0
    for path, n_shards in counts.items():
        columns[path] = _Column(nbytes[start : start + n_shards], checksums[start : start + n_shards])
        start += n_shards
    return columns
