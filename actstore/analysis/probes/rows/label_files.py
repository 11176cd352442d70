"""Labels from a file: a column of a table, or an array."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError, StorageError
from actstore.reason import reason

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

SUFFIXES: Final = (".csv", ".parquet", ".npy")
_PLACES: Final = ("sequence", "position")


def read_labels(store: "CommittedStore", path: str) -> NDArray[Any]:
    """The labels in a file, as `fit_probe` takes them.

    A ``.npy`` file holds an array, [n_sequences] or [n_sequences, width]. A table (``.csv`` with a line of names, or
    ``.parquet``) has a column ``label``, with a line for each sequence in order; or with ``sequence``, or ``sequence``
    and ``position``, which say where a label belongs.

    Raises:
        JobError: the file does not hold labels of this store.
        StorageError: it cannot be read.
    """
    if not Path(path).is_file():
        raise StorageError(f"there is no file {path}; give the name of a kept column, or a file of labels")
    try:
        if path.endswith(".npy"):
            array: NDArray[Any] = np.load(path, allow_pickle=False)
            return array
        table = _table(path)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read as labels: {reason(error)}") from error
    if "label" not in table:
        raise JobError(f"{path} has the columns {', '.join(table)}; name the one with the labels label")
    labels = table["label"]
    unknown = sorted(table.keys() - {"label", *_PLACES})
    if unknown:
        raise JobError(f"{path} has a column {unknown[0]}; it can have label, sequence and position")
    if "sequence" not in table:
        if "position" in table:
            raise JobError(f"{path} has positions and no sequences; add a column sequence")
        return labels
    return _placed(store, path, labels, *(table.get(name) for name in _PLACES))


def _table(path: str) -> dict[str, NDArray[Any]]:
    if path.endswith(".csv"):
        from pyarrow import csv

        table = csv.read_csv(path)
    else:
        import pyarrow.parquet as pq

        table = pq.read_table(path)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _placed(
    store: "CommittedStore",
    path: str,
    labels: NDArray[Any],
    sequences: NDArray[Any] | None,
    positions: NDArray[Any] | None,
) -> NDArray[Any]:
    """Labels at places of the store, and none elsewhere."""
    n_sequences, width = store.shape[0], store.plan.context_length
    sizes = (n_sequences,) if positions is None else (n_sequences, width)
    places = [column for column in (sequences, positions) if column is not None]
    for name, column, size in zip(_PLACES, places, sizes, strict=False):
        if column.dtype.kind not in "iu" or (len(column) and not 0 <= column.min() <= column.max() < size):
            raise JobError(f"{path} has a {name} that the store does not have; they are 0 to {size - 1}")
    is_text = labels.dtype.kind in "OUS"
    found: NDArray[Any] = np.full(sizes, None if is_text else np.nan, object if is_text else np.float64)
    found[tuple(places)] = labels
    if len(np.unique(np.ravel_multi_index(tuple(places), sizes))) < len(labels):
        raise JobError(f"{path} has two labels for one place; give one for each")
    return found
