"""Principal components of hooks, from the statistics of a store or in a pass over its rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.geometry.principal.pca_result import PCA, PCAs
from actstore.analysis.geometry.principal.spectrum import principal
from actstore.analysis.geometry.sums.moments import ProductSums
from actstore.analysis.geometry.sums.passes import MAX_NBYTES, packed_within, scan_each
from actstore.analysis.geometry.sums.source import Source, hooks_matching, may_have_not_finite, source_of
from actstore.analysis.scanning.scan import ScanOptions
from actstore.errors import JobError
from actstore.store.statistics.moments import has_statistics

if TYPE_CHECKING:
    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

_COMPONENTS: Final = 16
"""Components where a caller does not say how many."""


def pca(
    store: "CommittedStore",
    hooks: "HookName | Sequence[HookName]",
    n_components: int | None = None,
    *,
    max_nbytes: int = MAX_NBYTES,
    **options: Unpack[ScanOptions],
) -> Any:
    """Find the principal components of the rows of hooks, from covariances in float64.

    A store that was extracted with ``covariance`` has them in its statistics. If all of its rows are asked for, nothing
    is read then; otherwise the products of rows are summed in a pass.

    Args:
        store: the store.
        hooks: a stored hook; or a glob, or a list of them.
        n_components: components of each hook; None for 16, or as many as there are.
        max_nbytes: the most bytes of the sums of a pass. Hooks that need more together are read one after the other,
            with the same result. Each unit that is read at the same time takes as much.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Returns:
        A `PCA` for one hook; `PCAs`, by name of the hook, for a glob or a list.

    Raises:
        JobError: an argument is not valid; there are fewer than two rows; or rows are larger than 16,384 elements.
        ActstoreError: see `scan`.
    """
    is_glob = isinstance(hooks, str) and "*" in hooks
    is_many = is_glob or isinstance(hooks, list)
    names = hooks_matching(store, hooks)
    sources = [source_of(store, name) for name in names]
    if n_components is not None:
        smallest = min(sources, key=lambda source: source.size)
        if not 1 <= n_components <= smallest.size:
            raise JobError(
                f"n_components is {n_components}; rows of {smallest.hook} have {smallest.size} elements, so it can be "
                f"1 to {smallest.size}"
            )
    found: dict[str, PCA] = {}
    if _takes_all_rows(options):
        for source in sources:
            one = _from_statistics(store, source, n_components)
            if one is not None:
                found[source.hook] = one
    pending = [source for source in sources if source.hook not in found]
    reductions = [
        ProductSums(tuple(group), tuple((i, i) for i in range(len(group))))
        for group in _groups(store, pending, max_nbytes)
    ]
    for scanned in scan_each(store, reductions, **options):
        sums = scanned.results["sums"]
        for i, source in enumerate(sums.sources):
            moment = sums.centred(i, i)
            found[source.hook] = _pca(
                store,
                source,
                n_components,
                moment,
                sums.mean(i),
                sums.count,
                scanned.n_not_finite[source.hook],
            )
    ordered = {name: found[name] for name in names}
    return PCAs(ordered) if is_many else ordered[names[0]]


def _takes_all_rows(options: ScanOptions) -> bool:
    drop = options.get("drop", ())
    names = (drop,) if isinstance(drop, str) else tuple(drop)
    is_all = all(name in ("pad", "nonfinite") for name in names)
    return is_all and options.get("seqpos") is None and options.get("sequences") is None


def _groups(store: "CommittedStore", sources: Sequence[Source], max_nbytes: int) -> list[list[Source]]:
    """Sources that are read in one pass. A row that is not finite in a hook is left out for all hooks of a pass, so
    a hook that has such rows has a pass of its own, whatever the budget.
    """
    alone = [source for source in sources if may_have_not_finite(source, store)]
    others = [(source, 8 * source.size**2) for source in sources if source not in alone]
    return [*packed_within(others, max_nbytes), *([source] for source in alone)]


def _from_statistics(store: "CommittedStore", source: Source, n_components: int | None) -> PCA | None:
    """Components from the statistics of the store; None if these have no covariance."""
    store[source.hook].rows.check_committed()
    if not has_statistics(store.array_of(source.hook)):
        return None
    statistics = store.stats(source.hook)
    covariance = statistics.covariance
    if covariance is None:
        return None
    moment = covariance * statistics.count
    mean, n = statistics.mean.reshape(-1), statistics.count
    return _pca(
        store, source, n_components, moment, mean, n, statistics.n_not_finite, is_from_statistics=True
    )


def _pca(
    store: "CommittedStore",
    source: Source,
    n_components: int | None,
    moment: NDArray[np.float64],
    mean: NDArray[np.float64],
    count: int,
    n_not_finite: int,
    *,
    is_from_statistics: bool = False,
) -> PCA:
    """Components from the sum of the products of rows less their mean, [size, size]."""
    if count < 2:
        raise JobError(
            f"{source.hook} has {count} rows that are finite and not dropped, and 2 are needed; choose more of them"
        )
    covariance = moment / (count - 1)
    k = min(_COMPONENTS, source.size) if n_components is None else n_components
    components, variances = principal(covariance, k)
    return PCA(
        hook=source.hook,
        shape=tuple(store.array_of(source.hook).shape),
        components=components,
        explained_variance=variances,
        total_variance=float(np.trace(covariance)),
        mean=mean,
        count=count,
        n_not_finite=n_not_finite,
        is_from_statistics=is_from_statistics,
    )
