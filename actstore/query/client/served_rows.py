"""Reads rows of a served array: the server cuts out what is wanted, in as few requests as possible."""

import http.client
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.query.client.bounds import check_length, shown, unexpected
from actstore.query.client.connections import read_into
from actstore.query.client.server import Server
from actstore.query.documents import Pick, Select
from actstore.query.selection import Indices, text_of
from actstore.query.wire import DTYPE, RAW, SHAPE
from actstore.storage.blobs import BlobReader
from actstore.store.reading.checksums import Checksums
from actstore.store.reading.read_all import read_all
from actstore.store.reading.row_index import RowIndex
from actstore.store.reading.rows import Rows, Section
from actstore.store.reading.sections import Piece
from actstore.store.reading.whole_shards import WholeShards

_REQUEST_NBYTES: Final = 32 << 20
"""Bytes of one request; larger reads send several requests at once."""
_REQUESTS: Final = 4
_MAX_LISTED: Final = 50_000
"""Sequences in a list at most."""
_MAX_PICKED: Final = 25_000
"""Rows in one request at most that are picked one by one."""
_MAX_TEXT: Final = 2_000
"""Characters in a URL at most; longer texts go into the body of a POST."""


class ServedRows(Rows):
    """`Rows` of a server."""

    def __init__(
        self,
        server: Server,
        name: str,
        blobs: BlobReader,
        sections: Sequence[Section],
        checksums: Checksums,
    ) -> None:
        """
        Args:
            server: server of the store.
            name: name of the hook, or of the array of tokens.
            blobs: the same store as objects, for callers that read shards.
            sections: sections as for `Rows`.
            checksums: checksums as for `Rows`.
        """
        super().__init__(blobs, sections, checksums)
        self._server = server
        self._name = name

    def _fill(
        self,
        index: RowIndex,
        values: NDArray[Any],
        piece: Piece | None,
        n_requests: int,
        whole: WholeShards | None,
    ) -> None:
        inner = _inner(index, self.shape)
        if inner is None:
            super()._fill(index, values, piece, n_requests, whole)
            return
        memory = values.reshape(-1).view(np.uint8)
        row_nbytes = memory.nbytes // len(index.rows)
        step = max(1, _REQUEST_NBYTES // max(1, row_nbytes))
        if not isinstance(index.rows, range):
            step = min(step, _MAX_LISTED)
        starts = range(0, len(index.rows), step)

        def read(start: int) -> None:
            part = memory[start * row_nbytes : (start + step) * row_nbytes]
            self._read_part(index.rows[start : start + step], inner, part)

        if len(starts) == 1:
            read(0)
            return
        failed = threading.Event()

        def unless_failed(start: int) -> None:
            try:
                if not failed.is_set():
                    read(start)
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(min(_REQUESTS, len(starts)), thread_name_prefix="served") as threads:
            for done in [threads.submit(unless_failed, start) for start in starts]:
                done.result()

    def gather(self, sequences: NDArray[np.int64], entries: NDArray[np.int64]) -> NDArray[Any]:
        """Implements `Rows.gather`: one request for as many rows as fit into a reply."""
        values = np.empty((len(sequences), *self.shape[2:]), self.storage)
        row_nbytes = math.prod(self.shape[2:]) * self.storage.itemsize
        step = max(1, min(_REQUEST_NBYTES // row_nbytes, _MAX_PICKED))
        order = np.lexsort((entries, sequences))  # as they are stored

        def take(part: NDArray[np.int64]) -> None:
            values[part] = self._picked(sequences[part], entries[part])

        read_all(take, (order[start : start + step] for start in range(0, len(order), step)), _REQUESTS)
        return values

    def _picked(self, sequences: NDArray[np.int64], entries: NDArray[np.int64]) -> NDArray[Any]:
        """The rows of one request."""
        out = np.empty((len(sequences), *self.shape[2:]), self.storage)
        where = f"{self._server.url}/rows"
        memory = out.reshape(-1).view(np.uint8)

        def read(reply: http.client.HTTPResponse) -> None:
            check_kind(reply, where, self.dtype, out.shape)
            check_length(reply, where, out.nbytes)
            read_into(reply, memory)

        pick = Pick(hook=self._name, sequences=sequences.tolist(), entries=entries.tolist())
        self._server.take("/rows", read, request=pick, accept=RAW)
        self._server.count(out.nbytes)
        return out

    def _read_part(self, rows: Indices, inner: tuple[Indices, ...], out: NDArray[np.uint8]) -> None:
        where = f"{self._server.url}/hooks/{self._name}"
        shape = (len(rows), *(len(indices) for indices in inner))

        def take(reply: http.client.HTTPResponse) -> None:
            check_kind(reply, where, self.dtype, shape)
            check_length(reply, where, out.nbytes)
            read_into(reply, out)

        positions = text_of(inner[0]) if inner else ":"
        elements = ",".join(map(text_of, inner[1:])) if len(inner) > 1 else None
        sequences = text_of(rows)
        if len(sequences) + len(positions) < _MAX_TEXT:
            query = {"seq": sequences, "pos": positions} | ({} if elements is None else {"inner": elements})
            self._server.take(f"/hooks/{self._name}/slice", take, query=query, accept=RAW)
        else:
            select = Select(
                hooks=[self._name],
                sequences=_listed(rows),
                inner=elements,
                **{f"{self.axes[1]}s": _listed(inner[0])} if inner else {},
            )
            self._server.take("/select", take, request=select, accept=RAW)
        self._server.count(out.nbytes)


def check_kind(reply: http.client.HTTPResponse, where: str, dtype: str, shape: Sequence[int]) -> None:
    """See that raw bytes belong to the array that was asked for.

    Raises:
        StorageError: the bytes belong to another array.
    """
    given = (reply.getheader(DTYPE, "no type"), reply.getheader(SHAPE, "none"))
    expected = (dtype, ",".join(map(str, shape)))
    if given != expected:
        raise unexpected(
            where, shown(f"{given[0]} of shape {given[1]}"), f"{expected[0]} of shape {expected[1]}"
        )


def _listed(numbers: Indices) -> str | list[int]:
    return text_of(numbers) if isinstance(numbers, range) else numbers.tolist()


def _inner(index: RowIndex, shape: tuple[int, ...]) -> tuple[Indices, ...] | None:
    """Indices along the axes behind the first, whose values lie in the order in which they are wanted; None where text
    cannot express them.
    """
    inner = tuple(_numbers(shape[1:], index.inner[1:]))
    backwards = [isinstance(indices, range) and indices.step < 0 for indices in inner]
    if any(backwards[1:]) or any(not isinstance(indices, range) for indices in inner[1:]):
        return None
    if backwards and backwards[0]:
        inner = (np.asarray(inner[0], np.int64), *inner[1:])
    # An array without axes behind the positions has an empty tuple.
    return inner


def _numbers(shape: Sequence[int], key: Sequence[Any]) -> Iterator[Indices]:
    for axis, size in enumerate(shape):
        part = key[axis] if axis < len(key) else slice(None)
        if isinstance(part, slice):
            yield range(*part.indices(size))
        elif isinstance(part, int | np.integer):
            yield range(int(part) % size, int(part) % size + 1)
        else:
            listed = np.asarray(part)
            numbers = np.flatnonzero(listed) if listed.dtype == bool else listed.astype(np.int64).reshape(-1)
            yield np.where(numbers < 0, numbers + size, numbers)
