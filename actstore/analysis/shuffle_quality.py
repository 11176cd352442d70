"""How well an order mixes sequences: what is in its batches, next to what independent draws would put there."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.loader.loader import Loader

BATCHES: Final = 100
"""That are looked at, and that are drawn for comparison."""
_SEQUENCES: Final = 1 << 20
"""Whose rows are counted together."""
_SIGMAS: Final = 12
_TERMS: Final = 60
"""How far from its mean a number of rows is looked at: what is left out has a probability below 10^-28."""


@dataclass(frozen=True)
class Mixture:
    """What batches of one size are made of.

    Of a batch of B rows, c_s of them from sequence s, the entropy is ``H = -sum_s c_s/B ln(c_s/B)`` over the sequences
    that are in it, and the normalised entropy is ``H / ln(n)``, with n the sequences that have any row that is not
    dropped: 1 if each of them has as many rows as any other, 0 if all rows are from one. (So does saev normalise it,
    `calc_batch_entropy` in its `utils/statistics.py`.) It is 0 where n is 1. No batch can have more than
    ``ln(min(B, n)) / ln(n)``.
    """

    sequences: float
    """Sequences in a batch, on average."""
    rows_per_sequence: float
    """Rows of a batch from each sequence that is in it: rows of all batches over sequences of all batches."""
    most_rows: float
    """Rows of a batch from the sequence that has most of them, on average."""
    entropy: float
    """Normalised, on average."""


@dataclass(frozen=True)
class ShuffleQuality:
    """Batches of an order, and independent draws."""

    n_rows: int
    """Of an epoch."""
    n_sequences: int
    """That have any of them."""
    batch_rows: int
    """Rows of a batch, of this rank."""
    n_batches: int
    """That were looked at."""
    order: Mixture
    independent: Mixture
    """Where each row of a batch is any valid row, whatever the other rows are.

    A sequence with m of M valid rows then has Binomial(B, m/M) rows of a batch, so expectations of sums over sequences
    are exact: the number of occupied cells ``sum_s 1 - (1 - m_s/M)^B`` (Feller, "An Introduction to Probability Theory
    and Its Applications", volume 1, section IX.2), and the entropy ``ln B - 1/B sum_s E[c_s ln c_s]``.
    `rows_per_sequence` is B over the former. `most_rows` has no such sum: it is the mean of `n_batches` draws.
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def shuffle_quality(loader: Loader, n_batches: int = BATCHES, epoch: int = 0) -> ShuffleQuality:
    """Look at some batches of a loader. Nothing is read.

    Args:
        loader: whose order it is; its state stays as it is.
        n_batches: how many batches, spread evenly over the epoch; all of them if there are fewer. A smaller batch at
            the end is left out.
        epoch: whose batches.

    Raises:
        LoaderError: no batch is asked for.
    """
    if n_batches < 1:
        raise LoaderError(f"{n_batches} batches are to be looked at; it must be 1 or more")
    whole = max(1, loader.n_rows // loader.options.batch_size)
    chosen = np.unique(np.linspace(0, whole - 1, min(n_batches, whole)).round().astype(np.int64)).tolist()
    length = loader.store.shape[1]
    batch_rows = len(loader.rows(chosen[0], epoch)[0])
    with_rows = _sequences_by_rows(loader.valid_rows, length)
    n_sequences = int(with_rows[1:].sum())
    found = [_counts(loader.rows(k, epoch)[0]) for k in chosen]
    return ShuffleQuality(
        n_rows=loader.n_rows,
        n_sequences=n_sequences,
        batch_rows=batch_rows,
        n_batches=len(chosen),
        order=Mixture(
            sequences=float(np.mean([len(counts) for counts in found])),
            rows_per_sequence=batch_rows * len(found) / sum(len(counts) for counts in found),
            most_rows=float(np.mean([counts.max() for counts in found])),
            entropy=float(np.mean([batch_entropy(counts, n_sequences) for counts in found])),
        ),
        independent=_independent(loader.valid_rows, length, with_rows, batch_rows, len(chosen)),
    )


def batch_entropy(counts: NDArray[np.int64], n_sequences: int) -> float:
    """The normalised entropy of a batch, see `Mixture`.

    Args:
        counts: rows of each sequence that is in the batch, all above 0.
        n_sequences: of which there could be some.
    """
    if n_sequences < 2:
        return 0.0
    parts = counts / counts.sum()
    return float(-(parts * np.log(parts)).sum() / math.log(n_sequences))


def _counts(sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each one comes, of those that do."""
    counts: NDArray[np.int64] = np.unique(sequences, return_counts=True)[1]
    return counts


def _sequences_by_rows(rows: ValidRows, length: int) -> NDArray[np.int64]:
    """How many sequences have m valid rows, by m, [length + 1]."""
    n_sequences = rows.n_rows // length
    found = np.zeros(length + 1, np.int64)
    for start in range(0, n_sequences, _SEQUENCES):
        edges = np.arange(start, min(start + _SEQUENCES, n_sequences) + 1) * length
        found += np.bincount(np.diff(rows.rank(edges)), minlength=length + 1)
    return found


def _independent(
    rows: ValidRows, length: int, with_rows: NDArray[np.int64], batch_rows: int, n_draws: int
) -> Mixture:
    n_sequences = int(with_rows[1:].sum())
    occupied = surplus = 0.0
    for m in np.flatnonzero(with_rows[1:]) + 1:
        probability = float(m) / rows.n_valid
        missed = math.exp(batch_rows * math.log1p(-probability)) if probability < 1 else 0.0
        occupied += int(with_rows[m]) * (1 - missed)
        surplus += int(with_rows[m]) * _mean_of_c_ln_c(batch_rows, probability)
    entropy = math.log(batch_rows) - surplus / batch_rows
    most = [int(_counts(draw // length).max()) for draw in _draws(rows, batch_rows, n_draws)]
    return Mixture(
        sequences=occupied,
        rows_per_sequence=batch_rows / occupied,
        most_rows=float(np.mean(most)),
        entropy=entropy / math.log(n_sequences) if n_sequences > 1 else 0.0,
    )


def _draws(rows: ValidRows, batch_rows: int, n_draws: int) -> Iterator[NDArray[np.int64]]:
    random = np.random.default_rng(0)
    for _ in range(n_draws):
        yield rows.select(random.integers(rows.n_valid, size=batch_rows))


def _mean_of_c_ln_c(n: int, probability: float) -> float:
    """Of a number c that is Binomial(n, probability)."""
    if probability >= 1:
        return n * math.log(n)
    mean = n * probability
    width = _SIGMAS * math.sqrt(mean) + _TERMS
    first = max(2, math.floor(mean - width))  # c ln c is 0 for 0 and 1
    c = np.arange(first, min(n, math.ceil(mean + width)) + 1)
    if not len(c):
        return 0.0
    log_odds = math.log(probability) - math.log1p(-probability)
    # The logarithm of the first probability, and from there that of each ratio to the one before it.
    begin = math.lgamma(n + 1) - math.lgamma(first + 1) - math.lgamma(n - first + 1)
    begin += first * math.log(probability) + (n - first) * math.log1p(-probability)
    steps = np.log((n - c[:-1]) / c[1:]) + log_odds
    logs = begin + np.concatenate([[0.0], np.cumsum(steps)])
    return float((np.exp(logs) * c * np.log(c)).sum())
