"""Keeping rows with a norm up to a limit, by the stored norms, or by the values where these are too close to tell."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from actstore.store.statistics.norms import steps

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

BLOCK_NBYTES: Final = 1 << 24
"""Bytes of tokens, norms or activations that are looked at together."""
_UNSURE: Final = 4
"""Distance from the limit, in steps of float32, up to which a stored norm does not decide. A stored norm is at most one
and a half steps off, and the limit half a step off its own float32.
"""


class NormLimit:
    """Rows whose Euclidean norm is at most a limit.

    The norm is that of the stored values in float64. Where norms are stored they decide for all rows except those next
    to the limit, whose values are read.
    """

    def __init__(self, store: "CommittedStore", hook: str, max_norm: float) -> None:
        self._acts = store[hook]
        self._counts = store.entries.counts
        self._max_norm = max_norm
        acts_nbytes = self._acts.nbytes // max(1, len(self._acts)) + 1
        self._acts_step = max(1, BLOCK_NBYTES // acts_nbytes)
        self._norms_step = max(1, BLOCK_NBYTES // max(1, self._acts.norms.row_nbytes))

    @property
    def n_at_once(self) -> int:
        """How many sequences are read together: their norms, or their values where norms are not stored."""
        n_with_norms = sum(map(len, self._acts.norms.ranges))
        return self._norms_step if n_with_norms == len(self._acts) else self._acts_step

    def apply(self, rows: slice, mask: NDArray[np.bool_]) -> None:
        """Take the rows above the limit out of a mask.

        Args:
            rows: neighbouring sequences.
            mask: True where a row is kept, [n, entries]; changed in place. Rows that are False already are not
                read.
        """
        for start, stop, has_norms in self._blocks(rows.start, rows.stop):
            part = mask[start - rows.start : stop - rows.start]
            part &= self._by_norms(start, stop, part) if has_norms else self._by_values(slice(start, stop))

    def _blocks(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether norms are stored) of the sequences that are read together."""
        while start < stop:
            ranges = self._acts.norms.ranges
            has_norms = any(start in stored for stored in ranges)
            step = self._norms_step if has_norms else self._acts_step
            edges = (edge for stored in ranges for edge in (stored.start, stored.stop) if edge > start)
            end = min(stop, start + step, *edges)
            yield start, end, has_norms
            start = end

    def _by_norms(self, start: int, stop: int, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        if math.isnan(self._max_norm):
            return np.zeros(mask.shape, bool)  # no norm is below NaN
        norms = self._acts.norms[start:stop]
        with np.errstate(over="ignore"):
            limit = np.float32(self._max_norm) + np.float32(0)  # -0 is 0
        above = steps(norms) - steps(np.atleast_1d(limit))
        is_kept = above < -_UNSURE
        is_unsure = np.abs(above) <= _UNSURE
        is_nan = np.isnan(norms)
        if is_nan.any():
            # Padding has no stored norm, and its values may be wanted all the same.
            is_unsure |= is_nan & (np.arange(norms.shape[1]) >= self._counts[start:stop][:, None])
        is_unsure &= mask
        sequences = np.flatnonzero(is_unsure.any(axis=1))
        for first in range(0, len(sequences), self._acts_step):
            some = sequences[first : first + self._acts_step]
            is_kept[some] = np.where(is_unsure[some], self._by_values(start + some), is_kept[some])
        return is_kept

    def _by_values(self, rows: slice | NDArray[np.int64]) -> NDArray[np.bool_]:
        # In float64, so that sums do not differ between machines in any digit that matters: ranks must agree.
        values = self._acts[rows].double().flatten(2)
        # NaN is below nothing, so such rows are dropped, too.
        is_within: NDArray[np.bool_] = (values.square_().sum(-1).sqrt_() <= self._max_norm).numpy()
        return is_within
