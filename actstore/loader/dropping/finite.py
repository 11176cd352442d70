"""Telling whoever loads a hook that it has NaN or infinity, which training would not survive."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from actstore.errors import HookError, StorageError
from actstore.loader.dropping.drop import Drop
from actstore.store.statistics.moments import has_statistics

if TYPE_CHECKING:
    from actstore.store.store import Store

_MOST_SEGMENTS: Final = 4
"""That are named."""
_MOST_RECORDS: Final = 256
"""That are read to find them; only where there are any, or the run is not finished."""
_MOST_NBYTES: Final = 64 << 20
"""Of statistics of a run, which second moments make large: reading more would take seconds."""


class NotFiniteWarning(UserWarning):
    """Rows of a loader hold NaN or infinity, as the model computed them."""


def warn_of_not_finite(store: "Store", hooks: Sequence[str], drop: Drop) -> None:
    """Say which hooks have such rows, as their statistics count them, unless they are dropped; nothing else is read.

    Statistics that cannot be read are no reason not to load: readers of rows do not need them.
    """
    if drop.is_nonfinite_dropped:
        return
    runs = [run.finished.statistics.nbytes for run in store.runs if run.finished is not None]
    if sum(runs) > _MOST_NBYTES:
        return
    found = []
    for i, hook in enumerate(hooks):
        if not has_statistics(store.array_of(hook)) or (i == 0 and drop.max_norm is not None):
            continue
        try:
            where = store.not_finite(hook, most_segments=_MOST_SEGMENTS + 1, most_records=_MOST_RECORDS)
        except (HookError, StorageError):
            continue
        if where:
            found.append(_told(hook, where))
    if found:
        warnings.warn(
            f"{store.url} holds NaN or infinity, as the model computed them: {'; '.join(found)}; give "
            "drop=['nonfinite'] to leave these rows out",
            NotFiniteWarning,
            stacklevel=4,
        )


def _told(hook: str, where: Sequence[tuple[range, int]]) -> str:
    places = [
        f"{n_rows:,} rows of sequences {rows.start}:{rows.stop}" for rows, n_rows in where[:_MOST_SEGMENTS]
    ]
    return f"{hook} in {', '.join(places)}" + (" and others" if len(where) > _MOST_SEGMENTS else "")
