"""Norms of the rows of hooks by position and token id, in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.geometry.norms_result import Norms
from actstore.analysis.geometry.sums.source import check_finite, hooks_matching
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays
from actstore.analysis.scanning.scan import ScanOptions, scan
from actstore.store.statistics.norms import rounded

if TYPE_CHECKING:
    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

_ROWS = 1024
"""Rows whose norms are computed at a time, where they are not stored."""


@dataclass(frozen=True, eq=False)
class NormSums:
    """Reduction to sums of norms and of their squares by position, and sums and largest norms by token id."""

    hooks: tuple[str, ...]
    n_positions: int
    stored: "CommittedStore"
    """The store that is scanned, whose norms are read where it has them: a thousandth of the values."""

    def identity(self) -> str:
        return f"norms {self.hooks} {self.n_positions}"

    def start(self) -> "NormState":
        h, p = len(self.hooks), self.n_positions
        return NormState(
            self,
            {
                "n_at": np.zeros((1, p)),
                "sum_at": np.zeros((h, p)),
                "square_at": np.zeros((h, p)),
                "n_of": np.zeros((1, 0)),
                "sum_of": np.zeros((h, 0)),
                "max_of": np.zeros((h, 0)),
            },
        )

    def restore(self, arrays: Arrays) -> "NormState":
        """See `Reduction.restore`."""
        empty = self.start().sums
        n_tokens = np.shape(arrays["n_of"])[-1]
        for name, values in empty.items():
            expected = (len(values), n_tokens if name.endswith("_of") else self.n_positions)
            if np.shape(arrays[name]) != expected:
                raise ValueError("the state has another shape")
        return NormState(self, {name: np.array(arrays[name], np.float64) for name in empty})

    def finish(self, state: "NormState") -> "NormState":
        """The state, which is the result."""
        return state


class NormState:
    """The sums so far: ``_at`` positions, [n_hooks, n_positions], and ``_of`` token ids, up to the largest one."""

    def __init__(self, reduction: NormSums, sums: dict[str, NDArray[np.float64]]) -> None:
        self._of = reduction
        self.sums = sums

    def update(self, block: Block) -> None:
        """Take the rows of a block."""
        self._grow(int(block.tokens.max()) + 1)
        sums, n_tokens, n_positions = self.sums, self.sums["n_of"].shape[1], self._of.n_positions
        sums["n_at"][0] += np.bincount(block.positions, minlength=n_positions)
        sums["n_of"][0] += np.bincount(block.tokens, minlength=n_tokens)
        for number, hook in enumerate(self._of.hooks):
            norms = self._norms(block, hook).astype(np.float64)
            sums["sum_at"][number] += np.bincount(block.positions, norms, n_positions)
            sums["square_at"][number] += np.bincount(block.positions, norms * norms, n_positions)
            sums["sum_of"][number] += np.bincount(block.tokens, norms, n_tokens)
            np.maximum.at(sums["max_of"][number], block.tokens, norms)

    def _norms(self, block: Block, hook: str) -> NDArray[np.float32]:
        """The norm of each row, [n_rows]."""
        import torch

        stored = self._of.stored[hook].norms
        first, last = int(block.sequences[0]), int(block.sequences[-1])
        if any(first in part and last in part for part in stored.ranges):
            every = stored[first : last + 1].reshape(-1)
            chosen: NDArray[np.float32] = every[block.addresses - first * block.width]
            return chosen
        rows = block.values(hook).flatten(1)
        norms = [torch.linalg.vector_norm(part.double(), dim=1) for part in torch.split(rows, _ROWS)]
        return rounded(torch.cat(norms).numpy())

    def _grow(self, n_tokens: int) -> None:
        missing = n_tokens - self.sums["n_of"].shape[1]
        if missing > 0:
            for name in ("n_of", "sum_of", "max_of"):
                self.sums[name] = np.pad(self.sums[name], ((0, 0), (0, missing)))

    def merge(self, other: Self) -> None:
        """Add the sums of rows that follow."""
        for state, n_tokens in ((self, other.sums["n_of"].shape[1]), (other, self.sums["n_of"].shape[1])):
            state._grow(n_tokens)
        for name, values in other.sums.items():
            if name == "max_of":
                np.maximum(self.sums[name], values, out=self.sums[name])
            else:
                self.sums[name] += values

    def arrays(self) -> Arrays:
        """All sums."""
        return self.sums


def norms(
    store: "CommittedStore",
    hooks: "HookName | Sequence[HookName]",
    **options: Unpack[ScanOptions],
) -> Norms:
    """Norms of the rows of hooks by position and by token id. Norms that the store has are read in the place of values.

    Args:
        store: the store.
        hooks: a stored hook, a glob, or a list of them.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: values of a hook are not finite by design.
        ActstoreError: see `scan`.
    """
    names = hooks_matching(store, hooks)
    for name in names:
        check_finite(name)
    scanned = scan(store, {"norms": NormSums(names, store.plan.context_length, store)}, **options)
    sums = scanned.results["norms"].sums
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums["sum_at"] / sums["n_at"]
        spread = np.sqrt(np.maximum(sums["square_at"] / sums["n_at"] - mean**2, 0))
        of_tokens = sums["sum_of"] / sums["n_of"]
    return Norms(
        hooks=names,
        count_by_position=sums["n_at"][0].astype(np.int64),
        mean_by_position=mean,
        std_by_position=spread,
        count_by_token=sums["n_of"][0].astype(np.int64),
        mean_by_token=of_tokens,
        max_by_token=np.where(sums["n_of"] > 0, sums["max_of"], np.nan),
        n_not_finite=sum(scanned.n_not_finite.values()),
        store=store,
    )
