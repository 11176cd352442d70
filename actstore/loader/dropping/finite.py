"""Warning that a hook holds NaN or infinity, which would ruin a training."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from actstore.counted import counted
from actstore.errors import HookError, StorageError
from actstore.loader.dropping.drop import Drop
from actstore.store.statistics.moments import has_statistics

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

_MOST_SEGMENTS: Final = 4
"""The most segments that the warning names."""
_MOST_RECORDS: Final = 256
"""The most records that are read to find them. Nothing is read if the run is sealed and counted none."""
_MOST_NBYTES: Final = 64 << 20
"""Bytes of statistics of a run above which none are read: second moments make them large, and it would take seconds."""


class NotFiniteWarning(UserWarning):
    """Rows of a loader hold NaN or infinity, as computed by the model."""


def warn_of_not_finite(store: "CommittedStore", hooks: Sequence[str], drop: Drop) -> None:
    """Warn which hooks have NaN or infinity according to their statistics, unless such rows are dropped. No row is
    read.

    If statistics cannot be read, there is no warning and no error: loading rows does not need them.
    """
    if drop.is_nonfinite_dropped:
        return
    runs = [run.finished.statistics.nbytes for run in store.runs if run.finished is not None]
    if sum(runs) > _MOST_NBYTES:
        return
    descriptions = []
    for i, hook in enumerate(hooks):
        if not has_statistics(store.array_of(hook)) or (i == 0 and drop.max_norm is not None):
            continue
        try:
            where = store.not_finite(hook, most_segments=_MOST_SEGMENTS + 1, most_records=_MOST_RECORDS)
        except (HookError, StorageError):
            continue
        if where:
            descriptions.append(_described(hook, where))
    if descriptions:
        warnings.warn(
            f"{store.url} holds NaN or infinity, as the model computed them: {'; '.join(descriptions)}; give "
            "drop=['nonfinite'] to leave these rows out",
            NotFiniteWarning,
            stacklevel=4,
        )


def _described(hook: str, where: Sequence[tuple[range, int]]) -> str:
    places = [
        f"{counted(n_rows, 'row')} of sequences {rows.start}:{rows.stop}"
        for rows, n_rows in where[:_MOST_SEGMENTS]
    ]
    return f"{hook} in {', '.join(places)}" + (" and others" if len(where) > _MOST_SEGMENTS else "")
