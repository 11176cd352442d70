"""Rows of one array, as NumPy arrays in the storage type."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import NotCommittedError
from actstore.storage.blobs import BlobReader, Bytes
from actstore.storage.errors import BlobNotFoundError, damaged
from actstore.store.format.dtypes import dtype
from actstore.store.format.layout import ArrayLayout, RowRange
from actstore.store.format.shard_reader import CompressedShards
from actstore.store.reading.checksums import Checksums
from actstore.store.reading.read_all import read_all
from actstore.store.reading.row_index import RowIndex, Selection
from actstore.store.reading.scattered import ScatteredRead, scattered_reads
from actstore.store.reading.sections import PIECE_NBYTES, Piece, Section, Sections
from actstore.store.reading.whole_shards import WholeShards

REQUESTS: Final = 16
"""Default number of requests to remote storage under way at once."""
_READERS: Final = 8
"""The most threads that read local files; there are no more than cores."""
_FEW: Final = 64
"""Number of rows up to which only the requested positions of each row are read from remote storage."""
_REQUEST_NBYTES: Final = 1 << 20
"""A request to remote storage takes about as long as reading so many bytes more."""
_LOCAL_GAP: Final = 1 << 14
"""Unwanted bytes between two entries of a local file up to which they are read together."""
GATHERED_NBYTES: Final = 1 << 26
"""Bytes of compressed sequences from which entries are gathered together."""
_LARGE: Final = 1 << 27
"""Before more than so many bytes of memory are taken, a check looks whether storage has the rows."""
_MAX_NBYTES: Final = 1 << 62

__all__ = ["Rows", "Section"]


class Rows:
    """Reads an array as ``rows[key]`` with NumPy's basic indexing, and lists of rows on the first axis.

    Only the requested rows are read, straight into the array that is returned: one range of bytes for each run of
    neighbouring rows in a shard. If rows are few or wide, only the requested range of positions is read.
    """

    def __init__(
        self,
        blobs: BlobReader,
        sections: Sequence[Section],
        checksums: Checksums | None = None,
        *,
        check: bool = False,
    ) -> None:
        """
        Args:
            blobs: where the shards are.
            sections: parts of the array, in order.
            checksums: checksums of the committed shards. A shard that is read as a whole from remote storage is
                compared with its own; None compares nothing.
            check: whether to compare every shard when it is first used, also local ones and those read in part.
        """
        if not sections:
            raise ValueError("an array needs one section at least")
        self.blobs = blobs
        """Where the shards are."""
        self._is_local = blobs.is_local
        self.sections = tuple(sections)
        """Parts of the array, in order."""
        self._checksums = checksums
        self._check = check
        self._checks_all = check and checksums is not None
        self._checks_whole = checksums is not None and (check or not self._is_local)
        first = sections[0].layout
        for section in sections:
            kind = (section.layout.shape[1:], section.layout.dtype, section.layout.axes)
            if kind != (first.shape[1:], first.dtype, first.axes):
                raise ValueError(f"{section.layout.path} has other rows than {first.path}")
        self._places = Sections([section.layout for section in sections])
        self.shape: tuple[int, ...] = (self._places.starts[-1], *first.shape[1:])
        self.axes = first.axes
        self.dtype = first.dtype
        """Name of the type, such as ``bfloat16``."""
        self.path = first.path
        """Path of the array in the first section."""
        self.storage = dtype(first.dtype).storage
        """NumPy type of the arrays that are read."""
        self._compressed = tuple(
            CompressedShards(blobs, section.layout, section.nbytes_of)
            if section.layout.compression is not None
            else None
            for section in sections
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, committed or not; for compressed ones the most that they can take."""
        return sum(section.layout.nbytes for section in self.sections)

    def committed_pieces(self, rows: Selection) -> Iterator[Piece]:
        """Where rows are: one piece for each run of neighbours in a shard, in order.

        Raises:
            NotCommittedError: the segment of a row is not committed.
        """
        for piece in self._places.pieces(rows, None):
            self._check_committed(piece.section, piece.rows)
            yield piece

    def over(self, blobs: BlobReader, *, is_checked: bool | None = None) -> "Rows":
        """The same rows, read from somewhere else.

        Args:
            blobs: where the shards are.
            is_checked: whether all shards there were compared with the checksums before; None if they are those that
                this reads.
        """
        rows = Rows(blobs, self.sections, self._checksums, check=self._check)
        if is_checked is None:
            rows._checks_all, rows._checks_whole = self._checks_all, self._checks_whole
        elif is_checked:
            rows._checks_all = rows._checks_whole = False
        return rows

    def check_first_use(self, shards: Iterable[tuple[int, int]]) -> None:
        """Compare shards with what was committed, if every shard is compared at its first use and these were not yet.

        Args:
            shards: section and number of each shard.

        Raises:
            StorageError: a shard is not what was committed, or cannot be read.
        """
        if self._checks_all and self._checksums is not None:
            for section, shard in shards:
                self._checksums.check_once(self.sections[section].layout.key(shard))

    @property
    def checksums(self) -> Checksums | None:
        """Checksums with which every shard is compared when it is first used; None if that is not done."""
        return self._checksums if self._checks_all else None

    @property
    def layouts(self) -> tuple[ArrayLayout, ...]:
        """The layouts of the sections, in order."""
        return tuple(section.layout for section in self.sections)

    def check_committed(self) -> None:
        """Check that every row is committed.

        Raises:
            NotCommittedError: a row is not.
        """
        for number, section in enumerate(self.sections):
            for shard in range(section.layout.n_shards):
                first = shard * section.layout.shard_rows
                self._check_committed(number, RowRange(shard, 0, section.layout.rows_in(shard), first))

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Rows {self.path} {self.shape} {self.dtype}>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        del copy  # reading always makes a new array
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """Read rows in the storage type (bfloat16 as uint16).

        Raises:
            IndexError: a row is outside of the array.
            NotCommittedError: the segment of a row is not committed.
            StorageError: a shard is damaged or cannot be read.
        """
        return self._read(RowIndex.parse(key, self.shape), None, REQUESTS)

    def read(self, key: Any, out: NDArray[Any], *, n_requests: int = REQUESTS) -> NDArray[Any]:
        """Read rows into memory that exists already, which saves the allocation of new memory.

        Args:
            key: index as in ``rows[key]``, but not backwards.
            out: C-contiguous array of the storage type and the shape of ``rows[key]``; undefined after an error.
            n_requests: the most requests to remote storage at once.

        Returns:
            ``out``.
        """
        return self._read(RowIndex.parse(key, self.shape), out, n_requests)

    def gather(self, sequences: NDArray[np.int64], entries: NDArray[np.int64]) -> NDArray[Any]:
        """Read single entries that lie anywhere, in the storage type: ``array[sequences, entries]`` of NumPy.

        Neighbours are read together, so that each byte is read once.

        Args:
            sequences: sequence of each entry, [n], from 0 on.
            entries: number of each entry along the second axis, [n], from 0 on.

        Raises:
            NotCommittedError: the segment of a row is not committed.
            StorageError: a shard is damaged or cannot be read.
        """
        values = np.empty((len(sequences), *self.shape[2:]), self.storage)
        if not values.size:
            return values
        if any(reader is not None for reader in self._compressed):
            self._gather_whole(sequences, entries, values)
            return values
        flat = values.reshape(len(values), -1).view(np.uint8)
        gap = _LOCAL_GAP if self._is_local else _REQUEST_NBYTES
        reads = list(scattered_reads(self.layouts, sequences, entries, gap_nbytes=gap))
        for shard in {(read.section, read.shard): read for read in reads}.values():
            self._check_committed(shard.section, RowRange(shard.shard, 0, 1, shard.first_row))
        self.check_first_use(sorted({(read.section, read.shard) for read in reads}))

        def take(read: ScatteredRead) -> None:
            key = self.sections[read.section].layout.key(read.shard)
            try:
                data = np.frombuffer(self.blobs.read(key, read.start, read.nbytes), np.uint8)
            except BlobNotFoundError as error:
                raise _missing(self.blobs, key) from error
            flat[read.wanted] = data.reshape(-1, flat.shape[1])[read.at]

        read_all(take, reads, 1 if self._is_local else min(REQUESTS, len(reads)))
        return values

    def _gather_whole(
        self, sequences: NDArray[np.int64], entries: NDArray[np.int64], values: NDArray[Any]
    ) -> None:
        """Gather from whole sequences, some at a time, as compressed ones can only be read whole."""
        unique, inverse = np.unique(sequences, return_inverse=True)
        step = max(1, GATHERED_NBYTES // self.layouts[0].row_nbytes)
        order = np.argsort(inverse, kind="stable")
        for start in range(0, len(unique), step):
            whole = self[unique[start : start + step]]
            here = order[
                np.searchsorted(inverse[order], start) : np.searchsorted(inverse[order], start + step)
            ]
            values[here] = whole[inverse[here] - start, entries[here]]

    def as_stored(self, rows: range) -> Bytes | None:
        """Bytes of neighbouring whole rows, as they lie in a file; many bytes are not copied.

        Returns:
            The bytes of the first rows, as many as are in one file. None where they are in no file, or not stored as
            they are in memory; index the array then.

        Raises:
            NotCommittedError: the segment of a row is not committed.
            StorageError: a shard is damaged or cannot be read.
        """
        if not self._is_local or not rows:
            return None
        number, first = self._places.find(rows.start)
        layout = self.sections[number].layout
        if self._compressed[number] is not None:
            return None
        shard, within = divmod(first, layout.shard_rows)
        n_rows = min(len(rows), layout.rows_in(shard) - within)
        self._check_committed(number, RowRange(shard, within, n_rows, first))
        key = layout.key(shard)
        self.check_first_use([(number, shard)])
        try:
            return self.blobs.read(key, within * layout.row_nbytes, n_rows * layout.row_nbytes)
        except BlobNotFoundError as error:
            raise _missing(self.blobs, key) from error

    def _read(self, index: RowIndex, out: NDArray[Any] | None, n_requests: int) -> NDArray[Any]:
        shape = (len(index.rows), *index.inner_shape)
        if math.prod(shape) * self.storage.itemsize > _LARGE:
            self._check_there(index.rows)
        piece = self._places.one_piece(index.rows)
        # This comes before memory is taken: a plan may have far more rows than the store.
        shards = self._places.shards(index.rows) if piece is None else [(piece.section, piece.rows)]
        used = []
        for section, part in shards:
            self._check_committed(section, part)
            if self._checks_whole:
                used.append((section, part))
        if out is None:
            if math.prod(shape) * self.storage.itemsize > _MAX_NBYTES:
                raise MemoryError(f"rows of shape {shape} of {self.path} do not fit into memory")
            values = np.empty(shape, self.storage)
        else:
            wanted = index.result_shape
            if out.shape != wanted or out.dtype != self.storage or not out.flags.c_contiguous:
                raise ValueError(
                    f"out must be C-contiguous {self.storage} of shape {wanted}, "
                    f"got {out.dtype} of shape {out.shape}"
                )
            if index.is_reversed:
                raise ValueError("rows cannot be read backwards into out; read them forwards")
            values = out.reshape(shape)
        if values.size:
            whole = self._whole(index, used) if used else None
            self._fill(index, values, piece, n_requests, whole)
            if whole is not None:
                whole.check()
        if out is not None:
            return out
        if index.is_reversed:
            values = values[::-1]
        return values[0] if index.is_single else values

    def _whole(self, index: RowIndex, used: list[tuple[int, RowRange]]) -> WholeShards | None:
        """The shards that are read as a whole and compared with what was committed once they are read. The others are
        compared here if `check_first_use` compares them.
        """
        assert self._checksums is not None
        is_sparse, whole, parts = self._reads_ranges(index), [], []
        for section, part in used:
            layout = self.sections[section].layout
            if part.n_rows == layout.rows_in(part.shard) and not is_sparse:
                whole.append((layout, part.shard, self._compressed[section]))
            else:
                parts.append((section, part.shard))
        self.check_first_use(parts)
        return WholeShards(whole, self._checksums) if whole else None

    def _check_there(self, rows: Selection) -> None:
        """Check that storage has these rows at all, since a damaged plan may have more rows than storage can hold."""
        ends = []
        for row in (int(rows[0]), int(rows[-1])):
            section, first = self._places.find(row)
            shard, within = divmod(first, self.sections[section].layout.shard_rows)
            self._check_committed(section, RowRange(shard, within, 1, first))
            ends.append((self.sections[section].layout, shard))
        for layout, shard in ends:
            key, expected = layout.key(shard), layout.max_shard_nbytes(shard)
            info = self.blobs.head(key)
            if info is None:
                raise _missing(self.blobs, key)
            if layout.compression is None and info.nbytes != expected:
                raise damaged(f"{self.blobs.url}/{key}", info.nbytes, 0, expected)

    def _check_committed(self, section: int, part: RowRange) -> None:
        where = self.sections[section]
        if not where.is_committed(part.shard):
            first = self._places.starts[section] + part.first_row
            hint = f"; {where.why_absent}" if where.why_absent else ""
            raise NotCommittedError(
                f"sequences {first}:{first + part.n_rows} of {where.layout.path} (segment {part.shard}) are not "
                f"committed in {self.blobs.url}{hint}"
            )

    def _fill(
        self,
        index: RowIndex,
        values: NDArray[Any],
        piece: Piece | None,
        n_requests: int,
        whole: WholeShards | None,
    ) -> None:
        is_sparse = self._reads_ranges(index)

        def read(piece: Piece) -> None:
            try:
                out = values[piece.at : piece.at + piece.rows.n_rows]
                self._read_piece(piece, index, out, is_sparse, whole)
            except BlobNotFoundError as error:
                # A committed shard that is gone must never look like one that was not written yet.
                key = self.sections[piece.section].layout.key(piece.rows.shard)
                raise _missing(self.blobs, key) from error

        if piece is not None and (len(index.rows) == 1 or not is_sparse):
            read(piece)
            return
        max_rows = (1,) * len(self.sections) if is_sparse else self._places.max_rows
        if not self._is_local:
            n_threads = min(n_requests, len(index.rows))
        elif len(index.rows) * self.sections[0].layout.row_nbytes > PIECE_NBYTES:
            n_threads = min(os.cpu_count() or 1, _READERS)
        else:
            n_threads = 1
        read_all(read, self._places.pieces(index.rows, max_rows), n_threads)

    def _reads_ranges(self, index: RowIndex) -> bool:
        """Whether to read a part of each row rather than whole rows."""
        first = self.sections[0].layout
        if index.span is None or any(reader is not None for reader in self._compressed):
            return False
        if self._is_local:
            # Files are mapped, so unused pages are not read; for one row, a small read is faster than mapping.
            return len(index.rows) == 1
        unwanted = first.row_nbytes * (1 - (index.span.stop - index.span.start) / self.shape[1])
        return len(index.rows) <= _FEW or unwanted >= _REQUEST_NBYTES

    def _read_piece(
        self, piece: Piece, index: RowIndex, out: NDArray[Any], is_sparse: bool, whole: WholeShards | None
    ) -> None:
        layout, part = self.sections[piece.section].layout, piece.rows
        key, start = layout.key(part.shard), part.start * layout.row_nbytes
        if is_sparse and index.span is not None:
            position_nbytes = layout.row_nbytes // self.shape[1]
            start += index.span.start * position_nbytes
            shape = (part.n_rows, len(index.span), *self.shape[2:])
            inner = index.within_span
        else:
            shape, inner = (part.n_rows, *self.shape[1:]), index.inner
        on_read = None if whole is None else partial(whole.add, key)
        compressed = self._compressed[piece.section]
        if index.is_whole or (is_sparse and index.span_is_whole):
            if compressed is None:
                self.blobs.read_into(key, start, _bytes_of(out))
                if on_read is not None:
                    on_read(start, _bytes_of(out))
            else:
                compressed.read_into(part, _bytes_of(out), on_read)
            return
        nbytes = math.prod(shape) * self.storage.itemsize
        if compressed is None:
            data = self.blobs.read(key, start, nbytes)
            if on_read is not None:
                on_read(start, data)
        else:
            data = np.empty(nbytes, np.uint8)
            compressed.read_into(part, data, on_read)
        out[...] = np.frombuffer(data, self.storage).reshape(shape)[inner]


def _missing(blobs: BlobReader, key: str) -> BlobNotFoundError:
    return BlobNotFoundError(f"{blobs.url}/{key} is committed but missing; the store is damaged")


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)
