"""The difference of the means of two selections of rows: a steering vector, with its standard error."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.geometry.selection import Selection, selection_of
from actstore.analysis.geometry.showing.tables import table_html
from actstore.analysis.geometry.sums.source import check_finite
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays
from actstore.analysis.scanning.scan import ScanOptions, scan
from actstore.errors import JobError

if TYPE_CHECKING:
    import torch

    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

Float64 = NDArray[np.float64]
_PAIRS: Final = ((0, 0), (0, 1), (1, 1))


@dataclass(frozen=True, eq=False)
class MeanSums:
    """Reduction to sums of two selections of rows, and sums of squares over sequences, from which errors follow."""

    hook: str
    size: int
    selections: tuple[Selection, Selection]

    @property
    def hooks(self) -> tuple[str, ...]:
        return (self.hook,)

    def identity(self) -> str:
        return f"means {self.hook} {[one.identity() for one in self.selections]}"

    def start(self) -> "MeanState":
        return MeanState(self, {name: np.zeros(shape) for name, shape in self._shapes.items()})

    def restore(self, arrays: Arrays) -> "MeanState":
        """See `Reduction.restore`."""
        if {name: np.shape(values) for name, values in arrays.items()} != self._shapes:
            raise ValueError("the state has other arrays")
        return MeanState(self, {name: np.array(values, np.float64) for name, values in arrays.items()})

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "counts": (2,),
            "sums": (2, self.size),
            "n_sequences": (1,),
            "products": (3, self.size),
            "weighted": (2, 2, self.size),
            "squares": (2, 2),
        }

    def finish(self, state: "MeanState") -> "MeanState":
        """The state, which is the result."""
        return state


class MeanState:
    """The sums so far; s and n are the sum and the number of rows of a selection in one sequence."""

    def __init__(self, reduction: MeanSums, sums: dict[str, Float64]) -> None:
        self._of = reduction
        self.sums = sums
        """``counts`` and ``sums`` of both selections; over sequences ``n_sequences`` that have any of the rows,
        ``products`` s s of both, ``weighted`` n s, and ``squares`` n n.
        """

    def update(self, block: Block) -> None:
        """Take the rows of a block, which holds whole sequences."""
        import torch

        chosen = [one(block) for one in self._of.selections]
        if not (chosen[0] | chosen[1]).any():
            return
        rows = block.values(self._of.hook).flatten(1)
        sequences, number = np.unique(block.sequences, return_inverse=True)
        s = np.zeros((2, len(sequences), self._of.size))
        n = np.zeros((2, len(sequences)))
        for i, mask in enumerate(chosen):
            if mask.any():
                (places,) = np.nonzero(mask)
                exact = rows[torch.from_numpy(places)].double()
                total = torch.from_numpy(s[i])
                total.index_add_(0, torch.from_numpy(number[places]), exact)
                n[i] = np.bincount(number[places], minlength=len(sequences))
        sums = self.sums
        sums["counts"] += n.sum(1)
        sums["sums"] += s.sum(1)
        sums["n_sequences"] += np.count_nonzero(n.sum(0))
        sums["products"] += np.stack([np.einsum("cd,cd->d", s[i], s[j]) for i, j in _PAIRS])
        sums["weighted"] += np.einsum("ic,jcd->ijd", n, s)
        sums["squares"] += n @ n.T

    def merge(self, other: Self) -> None:
        """Add the sums of rows that follow."""
        for name, values in other.sums.items():
            self.sums[name] += values

    def arrays(self) -> Arrays:
        """All sums."""
        return self.sums

    def variance_of_difference(self) -> Float64:
        """Variance of the difference of the means, [size], of sequences drawn at random with all of their rows; NaN if
        there is only one.
        """
        counts, n_sequences = self.sums["counts"], float(self.sums["n_sequences"][0])
        means = self.sums["sums"] / counts[:, None]
        products, weighted, squares = (self.sums[name] for name in ("products", "weighted", "squares"))

        def centred(i: int, j: int) -> Float64:
            """Sum over sequences of (s_i - n_i m_i)(s_j - n_j m_j), over the product of the counts."""
            both: Float64 = products[i + j] - weighted[i, j] * means[i] - weighted[j, i] * means[j]
            both += squares[i, j] * means[i] * means[j]
            centred_sum: Float64 = both / (counts[i] * counts[j])
            return centred_sum

        total = np.maximum(centred(0, 0) - 2 * centred(0, 1) + centred(1, 1), 0.0)
        scaled: Float64 = total * (n_sequences / (n_sequences - 1) if n_sequences > 1 else np.nan)
        return scaled


@dataclass(frozen=True, eq=False, repr=False)
class MeanDifference:
    """The mean of the rows of a first selection less that of a second one."""

    hook: str
    shape: tuple[int, ...]
    """Shape of the value at one token."""
    vector: "torch.Tensor"
    """The difference, float32 [*shape]: what `patching.steering` adds."""
    first_mean: Float64
    """[*shape]."""
    second_mean: Float64
    """[*shape]."""
    standard_error: Float64
    """The error of each element of the difference, [*shape]. Sequences are taken as drawn at random, and their rows as
    belonging together; NaN if all rows are of one sequence.
    """
    counts: tuple[int, int]
    """Rows of both selections."""
    n_sequences: int
    """Sequences that have any of these rows."""
    n_not_finite: int
    """Rows with NaN or infinity, which were left out, selected or not."""
    selections: tuple[str, str]
    """What was selected, for people."""

    @property
    def norm(self) -> float:
        """Length of the difference."""
        return float(np.linalg.norm(self.first_mean - self.second_mean))

    def __repr__(self) -> str:
        first, second = self.selections
        noise = float(np.linalg.norm(self.standard_error))
        return (
            f"<MeanDifference {self.hook}: {first} ({self.counts[0]:,} rows) - {second} ({self.counts[1]:,} rows), "
            f"norm {self.norm:.4g}, norm of the standard error {noise:.2g}>"
        )

    def _repr_html_(self) -> str:
        means = (self.first_mean, self.second_mean)
        lines = [
            [text, f"{count:,}", f"{np.linalg.norm(mean):.4g}", ""]
            for text, count, mean in zip(self.selections, self.counts, means, strict=True)
        ]
        noise = f"{np.linalg.norm(self.standard_error):.2g}"
        lines.append(["difference", "", f"{self.norm:.4g}", noise])
        return table_html(f"Means of {self.hook}", ["", "rows", "norm", "norm of standard error"], lines)


def mean_difference(
    store: "CommittedStore",
    hook: "HookName",
    first: Any,
    second: Any,
    **options: Unpack[ScanOptions],
) -> MeanDifference:
    """The mean of some rows less the mean of others, in one pass: a steering vector.

    ``steering(mean_difference(store, hook, {"label": "verse"}, {"label": "prose"}).vector, hook, 4.0)`` is a pair for
    ``fwd_hooks``. Sums are float64.

    Args:
        store: the store.
        hook: a stored hook.
        first: rows whose mean is positive: a slice, a list of sequences, or bool [n_sequences]; bool [n_sequences,
            context_length]; or ``{"column": value}``, with one value of a kept column or a list of them.
        second: rows whose mean is taken off.
        options: further choice of rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: a selection is not valid, has no rows, or has rows of the other one.
        TokensError: the store does not keep the column.
        ActstoreError: see `scan`.
    """
    array = store.array_of(hook)
    check_finite(array.name)
    shape = tuple(array.shape)
    selections = selection_of(store, first), selection_of(store, second)
    if n_both := selections[0].overlap(selections[1]):
        raise JobError(
            f"{selections[0].text} and {selections[1].text} have {n_both:,} rows in common; choose rows that only one "
            "of them has"
        )
    reduction = MeanSums(array.name, int(np.prod(shape)), selections)
    scanned = scan(store, {"means": reduction}, **options)
    state: MeanState = scanned.results["means"]
    counts = state.sums["counts"]
    for selection, count in zip(selections, counts, strict=True):
        if not count:
            raise JobError(f"no row of {selection.text} is left to take the mean of; drop fewer rows")
    means = state.sums["sums"] / counts[:, None]
    return MeanDifference(
        hook=array.name,
        shape=shape,
        vector=_tensor((means[0] - means[1]).reshape(shape)),
        first_mean=means[0].reshape(shape),
        second_mean=means[1].reshape(shape),
        standard_error=np.sqrt(state.variance_of_difference()).reshape(shape),
        counts=(int(counts[0]), int(counts[1])),
        n_sequences=int(state.sums["n_sequences"][0]),
        n_not_finite=sum(scanned.n_not_finite.values()),
        selections=(selections[0].text, selections[1].text),
    )


def _tensor(values: Float64) -> "torch.Tensor":
    import torch

    return torch.from_numpy(values.astype(np.float32))
