"""Selections of rows: by sequence, by token, or by the value of a kept column."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.scanning.block import Block
from actstore.errors import JobError

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

_BLOCK: Final = 1 << 22
"""Entries that are looked at together."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Some rows of a store, one bit for each."""

    bits: NDArray[np.uint8]
    """Whether each entry is selected, through all sequences, as `numpy.packbits` packs it."""
    text: str
    """What was selected, for people."""

    def __call__(self, block: Block) -> NDArray[np.bool_]:
        """Whether each row of a block is selected, [n_rows]."""
        shift = (7 - (block.addresses & 7)).astype(np.uint8)
        chosen: NDArray[np.bool_] = (self.bits[block.addresses >> 3] >> shift & 1).astype(bool)
        return chosen

    def identity(self) -> str:
        """A text that differs for other rows."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.bits.tobytes()).hexdigest()

    def overlap(self, other: "Selection") -> int:
        """Number of entries that both select."""
        return int(np.bitwise_count(self.bits & other.bits).sum())


def selection_of(store: "CommittedStore", given: Any) -> Selection:
    """A selection from what a user gives.

    Args:
        store: the store that the rows are in.
        given: a slice, a list of sequences, or bool [n_sequences]; bool [n_sequences, context_length], or with slots
            in the place of positions; or ``{"column": value}``, with one value of a kept column or a list of them.
            Several columns must all have their values.

    Raises:
        JobError: it is none of these, or selects nothing.
        TokensError: the store does not keep the column.
    """
    n_sequences, width = store.shape
    bits = np.zeros(-(-n_sequences * width // 8), np.uint8)
    # Blocks begin at a whole byte.
    step = max(8, _BLOCK // width // 8 * 8)
    mask = _mask_of(store, given)
    for start in range(0, n_sequences, step):
        span = slice(start, min(start + step, n_sequences))
        packed = np.packbits(mask(span))
        bits[start * width // 8 :][: len(packed)] = packed
    if not bits.any():
        raise JobError(f"{_text(given)} selects no rows of {store.url}; a mean needs one at least")
    return Selection(bits, _text(given))


def _mask_of(store: "CommittedStore", given: Any) -> Any:
    """A function from a slice of sequences to bool [n, entries]."""
    n_sequences, width = store.shape
    if isinstance(given, Mapping):
        return _by_columns(store, given)
    if isinstance(given, slice):
        of_sequences = np.zeros(n_sequences, bool)
        of_sequences[given] = True
        return lambda span: np.repeat(of_sequences[span, None], width, axis=1)
    array = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    if array.ndim == 1 and array.dtype.kind in "iu" and array.size:
        if array.min() < -n_sequences or array.max() >= n_sequences:
            raise JobError(
                f"sequences reach from {array.min()} to {array.max()}, and the store has {n_sequences}"
            )
        of_sequences = np.zeros(n_sequences, bool)
        of_sequences[array] = True
        return lambda span: np.repeat(of_sequences[span, None], width, axis=1)
    length = store.plan.context_length
    if array.dtype == bool and array.shape == (n_sequences,):
        return lambda span: np.repeat(array[span, None], width, axis=1)
    if array.dtype == bool and array.shape == (n_sequences, width):
        return lambda span: array[span]
    if array.dtype == bool and array.shape == (n_sequences, length):
        entries = store.entries

        def by_position(span: slice) -> NDArray[np.bool_]:
            positions = entries.positions(span)
            taken: NDArray[np.bool_] = np.take_along_axis(array[span], np.maximum(positions, 0), axis=1)
            return taken & (positions >= 0)

        return by_position
    raise JobError(
        f"rows are selected by {array.dtype} of shape {array.shape}; give a slice or a list of sequences, bool "
        f"[{n_sequences}] or [{n_sequences}, {length}], or {{'column': value}} of a kept column"
    )


def _by_columns(store: "CommittedStore", given: Mapping[str, Any]) -> Any:
    if not given:
        raise JobError("rows are selected by no column; give {'column': value} of a kept column")
    of_rows: NDArray[np.bool_] | None = None
    for name, wanted in given.items():
        listed = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        values = store.kept.columns([name])[name].to_pylist()
        chosen = np.fromiter((value in listed for value in values), bool, len(values))
        if not chosen.any():
            shown = ", ".join(map(repr, list(dict.fromkeys(values))[:8]))
            raise JobError(f"no document has {_text({name: wanted})}; values of {name} are {shown}")
        of_rows = chosen if of_rows is None else of_rows & chosen
    assert of_rows is not None
    # -1, for tokens of no document, is the last of these.
    looked_up = np.append(of_rows, False)
    entries = store.entries

    def by_document(span: slice) -> NDArray[np.bool_]:
        documents = entries.of_tokens(store.documents, span)
        rows = store.kept.rows_of(documents, np.arange(span.start, span.stop))
        return looked_up[rows]

    return by_document


def _text(given: Any) -> str:
    if isinstance(given, Mapping):
        return " and ".join(f"{name} = {value}" for name, value in given.items())
    if isinstance(given, slice):
        return f"sequences {given.start}:{given.stop}"
    array = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    if array.dtype == bool:
        return f"a mask of {int(array.sum()):,} {'sequences' if array.ndim == 1 else 'rows'}"
    return f"{array.size:,} sequences"
