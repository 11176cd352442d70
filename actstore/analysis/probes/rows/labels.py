"""Labels: what is to be predicted for each entry of a store, and which document it belongs to."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError
from actstore.store.records.run import runs_with_tokens

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

_BLOCK: Final = 1 << 20
"""Entries whose documents are looked up together."""
_MOST_CLASSES: Final = 1000


@dataclass(frozen=True)
class Labels:
    """Labels of the entries of a store, by address: sequence times width plus entry."""

    values: NDArray[Any]
    """Number of the class, int32, or -1 where there is none; or what is predicted, float64, or NaN. [n_addresses]"""
    groups: NDArray[np.int32]
    """Number of the document, or of what else stays together, of each labelled entry; -1 for others. [n_addresses]"""
    classes: tuple[Any, ...]
    """The labels of the classes, sorted; empty where numbers are predicted."""

    @property
    def is_labelled(self) -> NDArray[np.bool_]:
        """[n_addresses]"""
        return self.groups >= 0

    def only(self, is_taken: NDArray[np.bool_]) -> "Labels":
        """The labels of some entries. Classes that none of them has are gone.

        Args:
            is_taken: [n_addresses]

        Raises:
            JobError: fewer than two classes are left.
        """
        groups = np.where(is_taken, self.groups, np.int32(-1))
        if not self.classes:
            return Labels(np.where(is_taken, self.values, np.nan), groups, ())
        present = np.unique(self.values[is_taken & self.is_labelled])
        if len(present) < 2:
            label = f"all labels are {self.classes[present[0]]!r}" if len(present) else "no row has a label"
            raise JobError(
                f"{label}; a probe needs labels of two classes or more, such as 0 and 1, since -1 means no label"
            )
        number = np.full(len(self.classes) + 1, -1, np.int32)  # of -1, too
        number[present] = np.arange(len(present))
        values = np.where(is_taken, number[self.values], np.int32(-1))
        return Labels(values, groups, tuple(self.classes[index] for index in present))


def labels_of(store: "CommittedStore", labels: Any, groups: Any, *, are_classes: bool) -> Labels:
    """Labels from what a user gives.

    Args:
        store: the store.
        labels: an array by sequence, [n_sequences], or by token, [n_sequences, width] or [n_sequences, positions],
            with NaN, None or -1 where there is no label; or the name of a kept column.
        groups: what must not be divided between training and held-out rows, as an array [n_sequences] or the name of
            a kept column; None for documents.
        are_classes: whether labels are classes, rather than numbers.

    Raises:
        JobError: they do not fit the store, or are of another kind.
        TokensError: the store does not keep the column.
    """
    by_entry = _by_entry(store, labels)
    values: NDArray[Any]
    if are_classes:
        values, classes = _numbered(by_entry)
        is_labelled = values >= 0
    else:
        values, classes = _numbers(by_entry), ()
        is_labelled = ~np.isnan(values)
    is_labelled = is_labelled & _in_use(store).reshape(-1)
    if not is_labelled.any():
        raise JobError("no row of the store has a label; give a label for some of the rows that are stored")
    keys = _documents(store) if groups is None else _groups(store, groups)
    if (keys[is_labelled] < 0).any():
        raise JobError("some labelled rows belong to no document; give groups, one for each sequence")
    numbered = np.full(len(keys), -1, np.int32)
    numbered[is_labelled] = np.unique(keys[is_labelled], return_inverse=True)[1]
    return Labels(values, numbered, classes).only(is_labelled)


def _by_entry(store: "CommittedStore", labels: Any) -> NDArray[Any]:
    """The labels of all entries, [n_sequences * width]."""
    n_sequences, width = store.shape
    if isinstance(labels, str):
        return _of_column(store, labels)
    given = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if given.shape == (n_sequences,):
        _refuse_several_documents(store)
        return np.repeat(given, width)
    if given.shape == (n_sequences, width):
        return given.reshape(-1)
    if store.entries.are_slots and given.shape == (n_sequences, store.plan.context_length):
        positions = store.entries.positions(slice(None))
        return np.take_along_axis(given, np.maximum(positions, 0).astype(np.int64), axis=1).reshape(-1)
    raise JobError(
        f"labels have the shape {list(given.shape)}; give one for each sequence, [{n_sequences}], or for each token, "
        f"[{n_sequences}, {width}]"
    )


def _of_column(store: "CommittedStore", name: str) -> NDArray[Any]:
    import pyarrow as pa

    column = store.kept.columns([name])[name]
    if pa.types.is_temporal(column.type):
        raise JobError(
            f"column {name} holds {column.type}, which cannot be labels; keep it as text or as numbers"
        )
    values = np.asarray(column.to_pylist() if _is_text(column) else column.to_numpy(zero_copy_only=False))
    if values.dtype == object and any(
        isinstance(value, list | dict | bytes) for value in values[:100].tolist()
    ):
        raise JobError(
            f"column {name} holds {column.type}, which cannot be labels; keep a column of text or numbers"
        )
    is_text = values.dtype.kind in "OUS"
    of_entries: NDArray[Any] = np.full(
        store.shape, None if is_text else np.nan, object if is_text else np.float64
    )
    for start, rows in _document_rows(store):
        sequence, entry = np.nonzero(rows >= 0)
        of_entries[start + sequence, entry] = values[rows[sequence, entry]]
    if values.dtype.kind == "b":
        booleans = np.full(store.shape, None, object)
        booleans[of_entries == 1], booleans[of_entries == 0] = True, False
        of_entries = booleans
    return of_entries.reshape(-1)


def _is_text(column: Any) -> bool:
    import pyarrow as pa

    kind = column.type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind))


def _document_rows(store: "CommittedStore") -> Any:
    """Rows of the kept columns by entry: (first sequence, [n, width]) of some sequences after the others."""
    for start, documents in _document_blocks(store):
        numbers = np.arange(start, start + len(documents))
        yield start, store.kept.rows_of(documents, numbers)


def _document_blocks(store: "CommittedStore") -> Any:
    """Documents by entry, as stored: (first sequence, [n, width]); tokens that packing put in have that of the text
    that follows, or else of the text before.
    """
    n_sequences, width = store.shape
    step = max(1, _BLOCK // width)
    for start in range(0, n_sequences, step):
        some = slice(start, min(start + step, n_sequences))
        documents = _filled(store.documents[some])
        if store.entries.are_slots:
            positions = np.maximum(store.entries.positions(some), 0)
            documents = np.take_along_axis(documents, positions.astype(np.int64), axis=1)
        yield start, documents


def _filled(documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Documents [n, positions] in which -1 is replaced by the next number, or else the one before."""
    n, width = documents.shape
    place = np.where(documents >= 0, np.arange(width), width)
    following = np.minimum.accumulate(place[:, ::-1], axis=1)[:, ::-1]
    place = np.where(documents >= 0, np.arange(width), -1)
    before = np.maximum.accumulate(place, axis=1)
    chosen = np.where(following < width, following, before)
    found = np.take_along_axis(documents, np.maximum(chosen, 0), axis=1)
    return np.where(chosen < 0, -1, found) if n else documents


def _documents(store: "CommittedStore") -> NDArray[np.int64]:
    """A number for the document of each entry that no other document of the store has, [n_addresses]."""
    keys = np.empty(store.shape, np.int64)
    for start, documents in _document_blocks(store):
        keys[start : start + len(documents)] = documents
    first = offset = 0
    for part in runs_with_tokens(store.runs):
        stop = first + part.plan.n_sequences
        here = keys[first:stop]
        highest = int(here.max(initial=-1))
        here[here >= 0] += offset
        offset += highest + 1
        first = stop
    # Ids that were given as arrays may have no documents: each sequence is one then.
    without = keys.max(axis=1, initial=-1) < 0
    keys[without] = (offset + np.flatnonzero(without))[:, None]
    return keys.reshape(-1)


def _groups(store: "CommittedStore", groups: Any) -> NDArray[np.int64]:
    n_sequences, width = store.shape
    if isinstance(groups, str):
        by_entry = _of_column(store, groups)
    else:
        given = np.asarray(groups)
        if given.shape != (n_sequences,):
            raise JobError(
                f"groups have the shape {list(given.shape)}; give one for each sequence, [{n_sequences}]"
            )
        by_entry = np.repeat(given, width)
    is_there = np.array([value is not None and value == value for value in by_entry.tolist()], bool)
    keys = np.full(len(by_entry), -1, np.int64)
    keys[is_there] = np.unique(by_entry[is_there].astype(str), return_inverse=True)[1]
    return keys


def _in_use(store: "CommittedStore") -> NDArray[np.bool_]:
    return store.entries.in_use(slice(None))


def _refuse_several_documents(store: "CommittedStore") -> None:
    for start, documents in _document_blocks(store):
        in_use = store.entries.in_use(slice(start, start + len(documents)))
        lowest = np.where(in_use & (documents >= 0), documents, np.iinfo(np.int64).max).min(axis=1)
        several = np.where(in_use, documents, -1).max(axis=1) > lowest
        if several.any():
            raise JobError(
                f"sequence {start + int(several.argmax())} holds several documents, so it has no one label; give "
                "labels by token, or extract with packing: document"
            )


def _numbered(labels: NDArray[Any]) -> tuple[NDArray[np.int32], tuple[Any, ...]]:
    """The number of each label among the sorted ones, -1 where there is none, and the sorted labels."""
    kind = labels.dtype.kind
    if kind == "f":
        is_there = ~np.isnan(labels)
        some = labels[is_there]
        if len(some) and (some != np.round(some)).any():
            example = some[some != np.round(some)][0]
            raise JobError(
                f"labels hold {example:g}, and classes are whole numbers or texts; choose kind: ridge to predict "
                "numbers"
            )
        labels = np.where(is_there, labels, -1).astype(np.int64)
        kind = "i"
    if kind in "iu":
        is_there = labels != -1 if kind == "i" else np.ones(labels.shape, bool)
        if len(labels[is_there]) and labels[is_there].min() < 0:
            raise JobError(
                f"labels hold {labels[is_there].min()}; classes are numbers from 0 on, and -1 means no label"
            )
    elif kind == "b":
        is_there = np.ones(labels.shape, bool)
    elif kind in "UO":
        is_there = np.array([value is not None and value == value for value in labels.tolist()], bool)
    else:
        raise JobError(f"labels are {labels.dtype}; give text, whole numbers or booleans")
    present = labels[is_there]
    try:
        names, numbers = np.unique(present.astype(str) if kind == "U" else present, return_inverse=True)
    except TypeError as error:
        raise JobError(
            "labels are of several types, which have no order; give all text or all numbers"
        ) from error
    if len(names) > _MOST_CLASSES:
        raise JobError(
            f"labels have {len(names):,} different values, and {_MOST_CLASSES:,} classes are the most; choose a column "
            "of classes, or kind: ridge to predict numbers"
        )
    codes = np.full(labels.shape, -1, np.int32)
    codes[is_there] = numbers
    return codes, tuple(names.tolist())


def _numbers(labels: NDArray[Any]) -> NDArray[np.float64]:
    """Labels as float64, NaN where there is none."""
    try:
        values = labels.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise JobError("labels are no numbers, which kind: ridge predicts; choose kind: logistic") from error
    if np.isinf(values).any():
        raise JobError("labels hold infinity; give finite numbers, or NaN where there is no label")
    return values
