"""Rows that a training leaves out, so that an evaluation can use them: whole documents, drawn by a hash."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

_TOKENS_AT_ONCE: Final = 1 << 22


class HeldOut(Protocol):
    """Which rows of a store are held out."""

    def __call__(self, documents: NDArray[np.int64], addresses: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether rows are held out, [n_rows].

        Args:
            documents: number of the document of each row, -1 for tokens that packing put in.
            addresses: ``sequence * width + entry`` of each row.
        """
        ...

    def identity(self) -> str:
        """A text that differs for other rows."""
        ...


@dataclass(frozen=True)
class ByDocument:
    """A fraction of the documents. Whether a document is held out depends on its number and the seed alone, so that a
    store that grows, and another store of the same text, hold out the same text.
    """

    fraction: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise JobError(f"the held-out fraction is {self.fraction}; it must be above 0, and 1 at most")
        if not 0 <= self.seed < 1 << 64:
            raise JobError(f"the seed is {self.seed}; it must be 0 to 2^64 - 1")

    def __call__(self, documents: NDArray[np.int64], addresses: NDArray[np.int64]) -> NDArray[np.bool_]:
        del addresses
        return self.of(documents)

    def of(self, documents: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether documents with these numbers are held out; tokens that packing put in (-1) are not."""
        draws = _mixed(documents.astype(np.uint64) + _mixed(np.array([self.seed], np.uint64)))
        # 53 bits of each, as a fraction of 1.
        return (documents >= 0) & ((draws >> np.uint64(11)).astype(np.float64) / (1 << 53) < self.fraction)

    def identity(self) -> str:
        return f"documents {self.fraction} {self.seed}"


@dataclass(frozen=True, eq=False)
class ByMask:
    """Rows of the user's choice."""

    mask: NDArray[np.bool_]
    """[n_sequences, entries]."""

    @classmethod
    def of(cls, mask: Any, store: "CommittedStore") -> "ByMask":
        """The rows where a mask [n_sequences, entries] or [n_sequences] is True.

        Raises:
            JobError: it does not fit the store, or is False everywhere.
        """
        given = np.asarray(mask)
        n_sequences, width = store.shape
        if given.dtype != bool or given.shape not in ((n_sequences,), (n_sequences, width)):
            raise JobError(
                f"held_out is {given.dtype} of shape {list(given.shape)}; give a fraction of the documents, or bool "
                f"[{n_sequences}] or [{n_sequences}, {width}]"
            )
        if not given.any():
            raise JobError("held_out is False everywhere; an evaluation needs one row at least")
        return cls(np.broadcast_to(given[:, None] if given.ndim == 1 else given, (n_sequences, width)))

    def __call__(self, documents: NDArray[np.int64], addresses: NDArray[np.int64]) -> NDArray[np.bool_]:
        del documents
        sequences, entries = np.divmod(addresses, self.mask.shape[1])
        held_out: NDArray[np.bool_] = self.mask[sequences, entries]
        return held_out

    def identity(self) -> str:
        return f"mask {self.mask.shape} {hashlib.sha256(np.packbits(self.mask).tobytes()).hexdigest()}"


def held_out_rows(store: "CommittedStore", fraction: float, seed: int = 0) -> NDArray[np.bool_]:
    """Draw documents to hold out of a training: True for their rows, [n_sequences, positions] (or slots).

    Train with ``mask=~held_out``, and evaluate with ``held_out=held_out``, or with the same fraction and seed. A
    document is held out as a whole: tokens of one document are too much alike to test on.

    Args:
        store: the store.
        fraction: about how many of the documents, above 0 to 1.
        seed: another seed draws other documents.

    Raises:
        JobError: the fraction or the seed is not valid, or it draws no document.
        StorageError: the numbers of the documents cannot be read.
    """
    drawn, entries = ByDocument(fraction, seed), store.entries
    n_sequences, width = store.shape
    mask = np.empty((n_sequences, entries.width), bool)
    step = max(1, _TOKENS_AT_ONCE // width)
    for first in range(0, n_sequences, step):
        span = slice(first, min(first + step, n_sequences))
        mask[span] = drawn.of(entries.of_tokens(store.documents, span)) & entries.in_use(span)
    if not mask.any():
        raise JobError(f"a fraction of {fraction} draws no document of {store.url}; hold out more of them")
    return mask


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit hash of each number, that of SplitMix64."""
    with np.errstate(over="ignore"):
        mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
