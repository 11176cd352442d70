"""The sequences that a store has, by a hash of their real token ids.

The index is kept in this process, and extended as stores grow.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from actstore.analysis.search import BLOCK_NBYTES
from actstore.recall.prompts import Ids
from actstore.store.committed_store import CommittedStore
from actstore.store.reading.identity import Identity, continues
from actstore.store.records.run import runs_with_tokens

_MOST_STORES: Final = 8
"""Stores whose sequences are kept in memory, some 250 bytes for each."""

Places = tuple[int, ...]
"""Rows of a store that hold the same sequence, ascending."""


def digest(ids: Ids) -> bytes:
    """SHA-256 of the ids of a sequence, without padding: the bytes of `actstore.analysis.search.sequence_sha256`."""
    return hashlib.sha256(ids.astype("<i4").tobytes()).digest()


class KnownSequences:
    """The rows of each sequence of one store, whose parts are read once."""

    def __init__(self) -> None:
        self._identity: Identity = ()
        self._parts: set[str] = set()
        self._places: dict[bytes, Places] = {}

    def is_of(self, store: CommittedStore) -> bool:
        """Whether a store is the one that was read, grown or not."""
        return continues(self._identity, store.identity)

    def extend(self, store: CommittedStore) -> None:
        """Read the parts that are new. One whose tokens are not stored yet is left for the next time."""
        first = 0
        for part in runs_with_tokens(store.runs):
            rows = range(first, first + part.plan.n_sequences)
            first = rows.stop
            if part.has_tokens and part.plan.run not in self._parts:
                # All of a part is read before any of it counts, as reading can fail.
                for row, known in zip(rows, list(_digests(store, rows)), strict=True):
                    self._places[known] = (*self._places.get(known, ()), row)
                self._parts.add(part.plan.run)
        self._identity = store.identity

    def places(self, known: bytes) -> Places:
        return self._places.get(known, ())


def places_of(store: CommittedStore, digests: Sequence[bytes]) -> list[Places]:
    """The rows of a store that hold each of some sequences; none where the store lacks it.

    Raises:
        StorageError: the tokens cannot be read.
    """
    with _LOCK:
        known = _KNOWN.pop(store.url, None)
        if known is None or not known.is_of(store):
            known = KnownSequences()
        known.extend(store)
        _KNOWN[store.url] = known
        while len(_KNOWN) > _MOST_STORES:
            _KNOWN.popitem(last=False)
        return [known.places(wanted) for wanted in digests]


def sequences_of(store: CommittedStore, rows: range) -> Iterator[Ids]:
    """The real token ids of neighbouring rows, block by block."""
    tokens, lengths = store.tokens, store.lengths
    step = max(1, BLOCK_NBYTES // (4 * store.plan.context_length))
    for first in range(rows.start, rows.stop, step):
        block = slice(first, min(first + step, rows.stop))
        for ids, length in zip(tokens[block], lengths[block], strict=True):
            yield ids[:length]


def _digests(store: CommittedStore, rows: range) -> Iterator[bytes]:
    return map(digest, sequences_of(store, rows))


_LOCK = threading.Lock()
_KNOWN: OrderedDict[str, KnownSequences] = OrderedDict()
