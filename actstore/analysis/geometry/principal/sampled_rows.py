"""Rows of a store at random, with a value of each to colour it by."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.scanning.chosen_rows import ChosenRows
from actstore.errors import JobError

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

POSITION: Final = "position"
_SEQUENCES: Final = 4096
"""Sequences that are looked at."""


@dataclass(frozen=True)
class SampledRows:
    """Rows of a store."""

    store: "CommittedStore"
    sequences: NDArray[np.int64]
    """[n_rows]."""
    positions: NDArray[np.int64]
    """[n_rows]."""
    color: str
    """``position``, or the kept column that the values are of."""
    values: NDArray[Any]
    """Position or value of the column of each row, [n_rows]."""


def sampled_rows(
    store: "CommittedStore", rows: ChosenRows, color: str, n_rows: int, seed: int
) -> SampledRows:
    """Draw rows, each once, in the order of the store. Of large stores, those of 4,096 sequences are drawn from.

    Raises:
        JobError: no row is left.
        TokensError: the store does not keep the column.
    """
    if n_rows < 1:
        raise JobError(f"n_rows is {n_rows}; it must be 1 or more")
    if seed < 0:
        raise JobError(f"seed is {seed}; it must be 0 or more")
    column = None if color == POSITION else store.kept.columns([color])[color]
    random = np.random.default_rng(seed)
    allowed = np.arange(store.shape[0]) if rows.sequences is None else np.flatnonzero(rows.sequences)
    chosen = np.sort(random.choice(allowed, min(len(allowed), _SEQUENCES), replace=False))
    entries = store.entries
    positions, taken = entries.positions(chosen), rows.taken(store, chosen)
    which, entry = np.nonzero(taken)
    if not len(which):
        raise JobError(
            f"no row of {store.url} is left to draw; drop fewer of them, or choose other sequences"
        )
    places = np.sort(random.choice(len(which), min(len(which), n_rows), replace=False))
    which, entry = which[places], entry[places]
    sequences, at = chosen[which], positions[which, entry].astype(np.int64)
    values: NDArray[Any] = at
    if column is not None:
        documents = entries.of_tokens(store.documents, chosen)[which, entry]
        of_rows = store.kept.rows_of(documents, sequences)
        every = column.to_pylist()
        values = np.empty(len(at), object)
        values[:] = [every[row] if row >= 0 else None for row in of_rows.tolist()]
    return SampledRows(store, sequences, at, color, values)
