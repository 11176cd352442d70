"""The mean and the largest value of features at each token id, exact."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.describing.finite import finite_rows
from actstore.analysis.features import Features, features_of
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays
from actstore.analysis.scanning.scan import ScanOptions, scan
from actstore.analysis.text import tokenizer_of
from actstore.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

MOST_CELLS: Final = 1 << 25
"""Features times token ids at most: each takes 12 bytes, in the result and in every unit under way."""
_FEATURES: Final = 512
"""Features that are summed together."""


@dataclass(frozen=True)
class CountByToken:
    """Reduction to the sum and the largest value of each feature at each token id."""

    hook: str
    features: Features
    tokens: tuple[int, ...] | None = None
    """Token ids that are looked at, ascending; None for all."""

    @property
    def hooks(self) -> tuple[str, ...]:
        return (self.hook,)

    def identity(self) -> str:
        return f"by token {self.hook} {self.tokens} {self.features.identity()}"

    def start(self) -> "TokenState":
        return TokenState(self)

    def restore(self, arrays: Arrays) -> "TokenState":
        """See `Reduction.restore`."""
        state = TokenState(self)
        state.ids, state.counts, state.sums, state.maxima = (
            arrays[name].copy() for name in ("ids", "counts", "sums", "maxima")
        )
        state.n_not_finite = int(arrays["n_not_finite"][0])
        if state.sums.shape != state.maxima.shape or len(state.ids) != len(state.sums):
            raise ValueError("the state has another shape")
        return state

    def finish(self, state: "TokenState") -> "TokenState":
        """The state, which is the result."""
        return state


class TokenState:
    """What is known of each token id so far."""

    def __init__(self, reduction: CountByToken) -> None:
        self._of = reduction
        self.ids: NDArray[np.int32] = np.empty(0, np.int32)
        """Token ids that were seen, ascending, [n_ids]."""
        self.counts: NDArray[np.int64] = np.empty(0, np.int64)
        """Rows of each, [n_ids]."""
        self.sums: NDArray[np.float64] = np.empty((0, 0), np.float64)
        """[n_ids, n_features]."""
        self.maxima: NDArray[np.float32] = np.empty((0, 0), np.float32)
        """[n_ids, n_features]."""
        self.n_not_finite = 0
        """Rows that were left out, as a feature was NaN or infinite."""

    def update(self, block: Block) -> None:
        """Take the rows of a block."""
        values = block.features(self._of.hook, self._of.features)
        tokens, finite = block.tokens, finite_rows(values)
        if finite is not None:
            self.n_not_finite += len(values) - len(finite)
            values, tokens = values[finite], tokens[finite]
        rows = np.argsort(tokens, kind="stable")
        if self._of.tokens is not None:
            rows = rows[np.isin(tokens[rows], self._of.tokens)]
        if not len(rows):
            return
        (starts,) = np.nonzero(np.diff(tokens[rows], prepend=-1))
        ids = tokens[rows[starts]]
        counts = np.diff(starts, append=len(rows))
        known = self._expect(ids, values.shape[1])
        self.counts[known] += counts
        numbers = values.numpy()
        for first in range(0, values.shape[1], _FEATURES):
            some = slice(first, first + _FEATURES)
            of_ids = numbers[rows, some]
            self.sums[known, some] += np.add.reduceat(of_ids, starts, axis=0, dtype=np.float64)
            maxima = np.maximum.reduceat(of_ids, starts, axis=0)
            self.maxima[known, some] = np.maximum(self.maxima[known, some], maxima)

    def merge(self, other: Self) -> None:
        """Take what is known of rows that follow."""
        self.n_not_finite += other.n_not_finite
        if not len(other.ids):
            return
        known = self._expect(other.ids, other.sums.shape[1])
        self.counts[known] += other.counts
        self.sums[known] += other.sums
        self.maxima[known] = np.maximum(self.maxima[known], other.maxima)

    def arrays(self) -> Arrays:
        """All that is known."""
        arrays: dict[str, NDArray[Any]] = {"ids": self.ids, "counts": self.counts}
        return arrays | {
            "sums": self.sums,
            "maxima": self.maxima,
            "n_not_finite": np.array([self.n_not_finite]),
        }

    def _expect(self, ids: NDArray[np.int32], n_features: int) -> NDArray[np.int64]:
        """The places of token ids, after room was made for new ones.

        Raises:
            JobError: there are too many.
        """
        joined = np.union1d(self.ids, ids).astype(np.int32)
        if len(joined) > len(self.ids):
            if len(joined) * n_features > MOST_CELLS:
                raise JobError(
                    f"{n_features:,} features of {len(joined):,} token ids or more are more than the {MOST_CELLS:,} "
                    f"that fit in memory; choose fewer features, or token ids with tokens="
                )
            places = np.searchsorted(joined, self.ids)
            old = (self.counts, self.sums, self.maxima)
            self.counts = np.zeros(len(joined), np.int64)
            self.sums = np.zeros((len(joined), n_features))
            self.maxima = np.full((len(joined), n_features), -np.inf, np.float32)
            if len(places):
                self.counts[places], self.sums[places], self.maxima[places] = old
            self.ids = joined
        return np.searchsorted(self.ids, ids)


@dataclass(frozen=True)
class TopTokens:
    """The token ids with the largest numbers of each feature, largest first."""

    token_ids: NDArray[np.int64]
    """[n_features, k]; -1 where there are fewer."""
    values: NDArray[np.float32]
    """[n_features, k]; NaN where there are fewer."""


@dataclass(frozen=True)
class ByToken:
    """The mean and the largest value of each feature at each token id that was seen."""

    hook: str
    token_ids: NDArray[np.int32]
    """Ascending, [n_ids]."""
    counts: NDArray[np.int64]
    """Rows of each token id, [n_ids]."""
    means: NDArray[np.float32] = field(repr=False)
    """[n_features, n_ids]."""
    maxima: NDArray[np.float32] = field(repr=False)
    """[n_features, n_ids]."""
    n_rows: int
    """Number of rows that were looked at."""
    n_not_finite: int
    """Rows that were left out, since they hold NaN or infinity, or a feature of theirs is not finite."""
    store: "CommittedStore" = field(repr=False)

    def __len__(self) -> int:
        return len(self.means)

    def top(self, k: int = 10, *, by: Literal["mean", "max"] = "mean", min_count: int = 1) -> TopTokens:
        """The token ids with the largest mean or largest value of each feature; of equal ones, the lowest ids.

        Args:
            k: token ids of each feature.
            by: what is compared.
            min_count: rows that a token id must have: the mean of few says little.

        Raises:
            JobError: an argument is not valid.
        """
        import torch

        from actstore.analysis.describing.ranking import largest

        if by not in ("mean", "max"):
            raise JobError(f"by is {by!r}; it can be mean or max")
        if k < 1 or min_count < 1:
            raise JobError(f"k is {k} and min_count is {min_count}; both must be 1 or more")
        (often,) = np.nonzero(self.counts >= min_count)
        n = min(k, len(often))
        ids, values = np.full((len(self), k), -1, np.int64), np.full((len(self), k), np.nan, np.float32)
        if n:
            numbers = torch.from_numpy((self.means if by == "mean" else self.maxima)[:, often])
            found, column = largest(numbers, n)
            values[:, :n], ids[:, :n] = found.numpy(), self.token_ids[often][column.numpy()]
        return TopTokens(ids, values)

    def text(self, token_id: int) -> str:
        """The text of a token id.

        Raises:
            TokensError: the tokenizer is unknown or missing, or is not the same any more.
        """
        return str(tokenizer_of(self.store).decode([int(token_id)]))


def by_token(
    store: "CommittedStore",
    hook: "HookName",
    of: Any,
    *,
    tokens: "Sequence[int] | None" = None,
    **options: Unpack[ScanOptions],
) -> ByToken:
    """The mean and the largest value of each feature at each token id: exact, in one pass over the store.

    Args:
        store: the store.
        hook: a stored hook.
        of: features, as for `top_activations`. Features times token ids must be 2^25 at most.
        tokens: token ids to look at; None for all that occur.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: an argument is not valid, or there are too many features and token ids.
        ActstoreError: see `scan`.
    """
    array = store.array_of(hook)
    chosen = None
    if tokens is not None:
        given = np.asarray(tokens)
        if given.ndim != 1 or given.dtype.kind not in "iu" or not given.size:
            raise JobError(f"tokens are {str(tokens)[:80]}; give a list of token ids")
        chosen = tuple(np.unique(given).tolist())
    reduction = CountByToken(array.name, features_of(of, array.shape), chosen)
    scanned = scan(store, {"tokens": reduction}, **options)
    state: TokenState = scanned.results["tokens"]
    return ByToken(
        hook=array.name,
        token_ids=state.ids,
        counts=state.counts,
        means=np.ascontiguousarray((state.sums / state.counts[:, None]).T, np.float32),
        maxima=np.ascontiguousarray(state.maxima.T),
        n_rows=scanned.n_rows,
        n_not_finite=sum(scanned.n_not_finite.values()) + state.n_not_finite,
        store=store,
    )
