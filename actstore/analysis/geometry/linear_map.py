"""A linear map from the rows of one hook to those of another, judged on held-out documents."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.geometry.documents import DocumentShare
from actstore.analysis.geometry.showing.tables import table_html
from actstore.analysis.geometry.sums.moments import Products, ProductSums
from actstore.analysis.geometry.sums.source import may_have_not_finite, over_same_tokens, source_of
from actstore.analysis.scanning.scan import ScanOptions, scan
from actstore.errors import JobError
from actstore.reason import reason

if TYPE_CHECKING:
    import torch

    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

Float64 = NDArray[np.float64]
Values = TypeVar("Values", "torch.Tensor", NDArray[Any])
_PAIRS: Final = ((0, 0), (0, 1), (1, 1))
_PLAIN: Final = ("from_hook", "to_hook", "l2", "r2", "r2_in_sample", "n_rows", "n_held_out", "n_not_finite")
_KEY: Final = "actstore.linear_map"


@dataclass(frozen=True, eq=False, repr=False)
class LinearMap:
    """The map ``row @ weight + bias`` from one hook to another, fitted by ridge regression."""

    from_hook: str
    to_hook: str
    weight: Float64
    """[size of a row of from_hook, size of one of to_hook]."""
    bias: Float64
    """[size of a row of to_hook]."""
    l2: float
    r2: float
    """Share of the variance of rows of held-out documents that the map explains, over all elements together."""
    r2_by_element: Float64
    """The same for each element, [size of a row of to_hook]; NaN where it does not vary."""
    r2_in_sample: float
    """Share of the variance of the rows that it was fitted on."""
    n_rows: int
    """Rows that it was fitted on."""
    n_held_out: int
    """Rows of held-out documents."""
    n_not_finite: int
    """Rows with NaN or infinity in one of the hooks, which were left out."""

    def __call__(self, rows: Values) -> Values:
        """Map rows.

        Args:
            rows: rows [..., size], flattened if the hook has several axes, as a tensor or an array.

        Returns:
            [..., size of a row of to_hook], computed in float64: as float64 if the rows are, and else as float32.

        Raises:
            JobError: the rows have another size.
        """
        import torch

        values: Any = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows
        if values.shape[-1] != len(self.weight):
            raise JobError(
                f"rows have {values.shape[-1]} elements, and those of {self.from_hook} {len(self.weight)}"
            )
        mapped = values.detach().cpu().double() @ torch.from_numpy(self.weight) + torch.from_numpy(self.bias)
        shown = mapped if values.dtype == torch.float64 else mapped.float()
        found: Values = shown.numpy() if isinstance(rows, np.ndarray) else shown
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this as safetensors."""
        import json

        from safetensors.numpy import save_file

        arrays = {
            name: np.ascontiguousarray(getattr(self, name)) for name in ("weight", "bias", "r2_by_element")
        }
        document = {name: getattr(self, name) for name in _PLAIN}
        save_file(arrays, path, metadata={_KEY: json.dumps(document)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            JobError: the file is no such map.
        """
        import json

        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                document = json.loads((file.metadata() or {})[_KEY])
                arrays = {name: file.get_tensor(name) for name in ("weight", "bias", "r2_by_element")}
                return cls(**document, **arrays)
        except FileNotFoundError:
            raise JobError(f"there is no file {Path(path)}") from None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"{Path(path)} holds no linear map, which LinearMap.save writes: {reason(error)}"
            ) from error

    def __repr__(self) -> str:
        return (
            f"<LinearMap {self.from_hook} -> {self.to_hook}, l2 {self.l2:g}: R2 {self.r2:.4f} of {self.n_held_out:,} "
            f"held-out rows, {self.r2_in_sample:.4f} of {self.n_rows:,} fitted ones>"
        )

    def _repr_html_(self) -> str:
        lines = [
            ["held out", f"{self.n_held_out:,}", f"{self.r2:.4f}"],
            ["fitted", f"{self.n_rows:,}", f"{self.r2_in_sample:.4f}"],
        ]
        title = f"{self.from_hook} to {self.to_hook}, l2 {self.l2:g}"
        return table_html(title, ["documents", "rows", "R2"], lines)


def linear_map(
    store: "CommittedStore",
    from_hook: "HookName",
    to_hook: "HookName",
    *,
    other_store: "CommittedStore | None" = None,
    l2: float = 1.0,
    held_out: float = 0.2,
    seed: int = 0,
    **options: Unpack[ScanOptions],
) -> LinearMap:
    """Fit a linear map from one hook to another over the same tokens by ridge regression, in one pass.

    It is that of all rows of the documents that are not held out, from sums in float64. Tokens that packing put in,
    such as BOS, belong to no document, and are left out.

    Args:
        store: the store.
        from_hook: a stored hook, whose rows are mapped.
        to_hook: the hook that they are mapped to.
        other_store: another store over the same tokens, such as one of a changed model, that has ``to_hook``.
            None for the same store.
        l2: penalty on the sum of the squared weights, next to the sum of the squared errors, as ``alpha`` of
            scikit-learn's ``Ridge``. The bias is free.
        held_out: share of the documents that are held out.
        seed: decides which documents these are.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: an argument is not valid, either side of the split has too few rows, or rows are larger than 16,384
            elements.
        LoaderError: the other store has other tokens.
        ActstoreError: see `scan`.
    """
    if not l2 >= 0 or not np.isfinite(l2):
        raise JobError(f"l2 is {l2}; it must be 0 or more")
    if not 0 < held_out < 1:
        raise JobError(f"held_out is {held_out}; it must be between 0 and 1")
    if not 0 <= seed < 2**63:
        raise JobError(f"seed is {seed}; it must be 0 or more, and below 2**63")
    other = over_same_tokens(store, other_store)
    sources = source_of(store, from_hook), source_of(store, to_hook, other)
    checked = tuple(source for source in sources if may_have_not_finite(source, store))
    fitted, judged = (
        ProductSums(sources, _PAIRS, checked, rows=DocumentShare(held_out, seed, is_held_out))
        for is_held_out in (False, True)
    )
    scanned = scan(store, {"fitted": fitted, "judged": judged}, **options)
    on, off = scanned.results["fitted"], scanned.results["judged"]
    for name, sums in (("not held out", on), ("held out", off)):
        if sums.count < 2:
            raise JobError(
                f"documents that are {name} have {sums.count} rows, and 2 are needed; choose another share than "
                f"{held_out}, another seed, or more rows"
            )
    weight = _solved(on.centred(0, 0), on.centred(0, 1), l2, sources[0].hook)
    bias = on.mean(1) - on.mean(0) @ weight
    by_element, r2 = _explained(off, weight, bias)
    return LinearMap(
        from_hook=sources[0].hook,
        to_hook=sources[1].hook,
        weight=weight,
        bias=bias,
        l2=float(l2),
        r2=r2,
        r2_by_element=by_element,
        r2_in_sample=_explained(on, weight, bias)[1],
        n_rows=on.count,
        n_held_out=off.count,
        n_not_finite=sum(scanned.n_not_finite.values()) + on.n_not_finite + off.n_not_finite,
    )


def _solved(moment: Float64, cross: Float64, l2: float, hook: str) -> Float64:
    """The weights of a ridge regression from centred sums of products.

    Raises:
        JobError: they are not determined.
    """
    import torch

    size = len(moment)
    damped = torch.from_numpy(moment + l2 * np.eye(size))
    factor, failed = torch.linalg.cholesky_ex(damped)
    pivots = factor.diagonal().square()
    if failed or pivots.min() <= pivots.max() * size * np.finfo(np.float64).eps:
        raise JobError(
            f"rows of {hook} do not vary in all {size} directions, so that a map with l2 {l2:g} is not determined; "
            "give a larger l2"
        )
    weight: Float64 = torch.cholesky_solve(torch.from_numpy(cross), factor).contiguous().numpy()
    return weight


def _explained(sums: Products, weight: Float64, bias: Float64) -> tuple[Float64, float]:
    """R2 of each element, and of all together, of the rows of some sums."""
    n = sums.count
    spread = np.diag(sums.centred(1, 1))
    # Errors are those of centred rows, and n times the square of the error of the mean.
    cross = np.einsum("fd,fd->d", weight, sums.centred(0, 1))
    squared = np.einsum("fd,fd->d", weight, sums.centred(0, 0) @ weight)
    of_mean = sums.mean(0) @ weight + bias - sums.mean(1)
    errors = np.maximum(spread - 2 * cross + squared + n * of_mean**2, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_element = np.where(spread > 0, 1 - errors / spread, np.nan)
        return by_element, float(1 - errors.sum() / spread.sum())
