"""How well an order mixes sequences: the composition of its batches, compared with that of independent draws."""

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
"""Number of batches to look at, and of batches to draw for comparison."""
_SEQUENCES: Final = 1 << 20
"""Number of sequences whose rows are counted together."""
_SIGMAS: Final = 12
_TERMS: Final = 60
"""Half-width of the counts that are summed around the mean; what is left out has a probability below 10^-28."""


@dataclass(frozen=True)
class Mixture:
    """The composition of batches of one size.

    In a batch of B rows with c_s rows of sequence s, the entropy is ``H = -sum_s c_s/B ln(c_s/B)`` over the sequences
    in the batch. The normalised entropy is ``H / ln(n)``, where n is the number of sequences with any row that is not
    dropped: it is 1 if all sequences have equally many rows, and 0 if all rows are of one sequence. (saev normalises it
    in the same way, in `calc_batch_entropy` of its `utils/statistics.py`.) It is 0 if n is 1, and at most ``ln(min(B,
    n)) / ln(n)``.
    """

    sequences: float
    """Mean number of sequences in a batch."""
    rows_per_sequence: float
    """Mean number of rows of a batch from a sequence that is in it: rows of all batches over sequences of all batches.
    """
    most_rows: float
    """Mean number of rows of a batch from the sequence with the most rows in it."""
    entropy: float
    """Mean normalised entropy."""


@dataclass(frozen=True)
class ShuffleQuality:
    """The composition of the batches of an order, and that of independent draws."""

    n_rows: int
    """Number of rows of an epoch."""
    n_sequences: int
    """Number of sequences with any of these rows."""
    batch_rows: int
    """Number of rows of a batch, of this rank."""
    n_batches: int
    """Number of batches that were looked at."""
    order: Mixture
    independent: Mixture
    """The composition if each row of a batch is any valid row, independently of the others.

    The number of rows of a batch from a sequence with m of M valid rows is then Binomial(B, m/M), so expectations of
    sums over sequences are exact: the number of occupied cells ``sum_s 1 - (1 - m_s/M)^B`` (Feller, "An Introduction to
    Probability Theory and Its Applications", volume 1, section IX.2), and the entropy ``ln B - 1/B sum_s E[c_s ln
    c_s]``. `rows_per_sequence` is B over the former. `most_rows` is no such sum; it is the mean of `n_batches` draws.
    """

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)


def shuffle_quality(loader: Loader, n_batches: int = BATCHES, epoch: int = 0) -> ShuffleQuality:
    """Measure the composition of some batches of a loader. No row is read.

    Args:
        loader: the loader with the order; its state does not change.
        n_batches: the number of batches, spread evenly over the epoch, or all if there are fewer. A smaller batch at
            the end is left out.
        epoch: the epoch of the batches.

    Raises:
        LoaderError: the number of batches is below 1.
    """
    if n_batches < 1:
        raise LoaderError(f"n_batches is {n_batches}; it must be 1 or more")
    whole = max(1, loader.n_rows // loader.options.batch_size)
    chosen = np.unique(np.linspace(0, whole - 1, min(n_batches, whole)).round().astype(np.int64)).tolist()
    length = loader.store.shape[1]
    batch_rows = len(loader.rows(chosen[0], epoch)[0])
    with_rows = _sequences_by_rows(loader.valid_rows, length)
    n_sequences = int(with_rows[1:].sum())
    batch_counts = [_counts(loader.rows(k, epoch)[0]) for k in chosen]
    return ShuffleQuality(
        n_rows=loader.n_rows,
        n_sequences=n_sequences,
        batch_rows=batch_rows,
        n_batches=len(chosen),
        order=Mixture(
            sequences=float(np.mean([len(counts) for counts in batch_counts])),
            rows_per_sequence=batch_rows * len(batch_counts) / sum(len(counts) for counts in batch_counts),
            most_rows=float(np.mean([counts.max() for counts in batch_counts])),
            entropy=float(np.mean([batch_entropy(counts, n_sequences) for counts in batch_counts])),
        ),
        independent=_independent(loader.valid_rows, length, with_rows, batch_rows, len(chosen)),
    )


def batch_entropy(counts: NDArray[np.int64], n_sequences: int) -> float:
    """The normalised entropy of a batch; see `Mixture`.

    Args:
        counts: the number of rows of each sequence in the batch, all above 0.
        n_sequences: the number of sequences that could have rows in it.
    """
    if n_sequences < 2:
        return 0.0
    parts = counts / counts.sum()
    return float(-(parts * np.log(parts)).sum() / math.log(n_sequences))


def _counts(sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of rows of each sequence that occurs."""
    counts: NDArray[np.int64] = np.unique(sequences, return_counts=True)[1]
    return counts


def _sequences_by_rows(rows: ValidRows, length: int) -> NDArray[np.int64]:
    """The number of sequences with m valid rows, by m, [length + 1]."""
    n_sequences = rows.n_rows // length
    n_sequences_by_rows = np.zeros(length + 1, np.int64)
    for start in range(0, n_sequences, _SEQUENCES):
        edges = np.arange(start, min(start + _SEQUENCES, n_sequences) + 1) * length
        n_sequences_by_rows += np.bincount(np.diff(rows.rank(edges)), minlength=length + 1)
    return n_sequences_by_rows


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
    """The mean of c ln c, where c is Binomial(n, probability)."""
    if probability >= 1:
        return n * math.log(n)
    mean = n * probability
    width = _SIGMAS * math.sqrt(mean) + _TERMS
    first = max(2, math.floor(mean - width))  # c ln c is 0 for 0 and 1
    c = np.arange(first, min(n, math.ceil(mean + width)) + 1)
    if not len(c):
        return 0.0
    log_odds = math.log(probability) - math.log1p(-probability)
    # The logarithm of the first probability, then the logarithms of the ratios of consecutive ones.
    begin = math.lgamma(n + 1) - math.lgamma(first + 1) - math.lgamma(n - first + 1)
    begin += first * math.log(probability) + (n - first) * math.log1p(-probability)
    steps = np.log((n - c[:-1]) / c[1:]) + log_odds
    logs = begin + np.concatenate([[0.0], np.cumsum(steps)])
    return float((np.exp(logs) * c * np.log(c)).sum())
