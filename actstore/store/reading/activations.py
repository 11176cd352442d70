"""The stored activations of one hook, indexed like a tensor."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.store.reading.entries import Entries, PaddingWarning
from actstore.store.reading.rows import Rows
from actstore.store.reading.stored_norms import StoredNorms

if TYPE_CHECKING:
    import torch
    import zarr


Numbers = int | Sequence[int] | NDArray[np.integer[Any]]


class Activations:
    """``acts[sequences, entries, ...]`` reads just those rows and gives a ``torch.Tensor`` in the stored dtype.

    Entries are positions, or slots where only chosen positions are stored. Indices are NumPy's: integers, slices,
    ``...``, a list of sequences on the first axis, and masks, bool [n_sequences] or [n_sequences, entries]. `last` and
    `at` take rows by their position in the real tokens.
    """

    def __init__(
        self,
        hook: str,
        rows: Rows,
        norms: StoredNorms,
        entries: Entries,
        open_zarr: "Callable[[], zarr.Group]",
    ) -> None:
        """
        Args:
            hook: name of the hook.
            rows: values of the hook.
            norms: norms of these rows.
            entries: what the second axis of the values is.
            open_zarr: opens the store through zarr-python.
        """
        self.hook = hook
        self.rows = rows
        self.norms = norms
        """L2 norms of the rows, float32 [n_sequences, entries]; NaN for padding."""
        self._entries = entries
        self._open_zarr = open_zarr

    @property
    def shape(self) -> tuple[int, ...]:
        """(sequences, entries, *shape of the hook)."""
        return self.rows.shape

    @property
    def axes(self) -> tuple[str, ...]:
        """Name of each axis."""
        return self.rows.axes

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        torch_dtype: torch.dtype = getattr(torch, self.rows.dtype)
        return torch_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, committed or not."""
        return self.rows.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> "torch.Tensor":
        """Read values into a new tensor on the CPU.

        An entry of -1 is the last one of the array, as in NumPy. Where that is padding in some sequences, a
        `PaddingWarning` says so: `last` gives the last real token of each.

        Raises:
            IndexError: the index is outside of the array.
            NotCommittedError: the segment of a row is not committed.
            StorageError: a shard is damaged or cannot be read.
        """
        import torch

        if _is_mask(key):
            return self._tensor(self._masked(key))
        if not self._entries.is_full and _is_last_entry(key, self.rows.shape):
            warnings.warn(
                f"entry -1 of {self.hook} is padding in sequences that are shorter than others; acts.last() gives the "
                "last real token of each",
                PaddingWarning,
                stacklevel=2,
            )
        tensor = torch.from_numpy(np.asarray(self.rows[key], order="C"))
        return tensor.view(self.dtype) if tensor.ndim else tensor.reshape(1).view(self.dtype)[0]

    def last(self, sequences: slice | Sequence[int] = slice(None)) -> "torch.Tensor":
        """The values at the last entry in use of each sequence, [n_sequences, *shape of the hook]: at its last real
        token, or the last of its chosen positions.

        Args:
            sequences: sequences, as for an index.

        Raises:
            IndexError: a sequence is outside of the store, or nothing is stored of it.
            NotCommittedError: the segment of a row is not committed.
            StorageError: a shard is damaged or cannot be read.
        """
        numbers = np.arange(len(self))[sequences]
        return self._tensor(self.rows.gather(numbers, self._entries.last(numbers)))

    def at(self, sequences: Numbers, positions: Numbers) -> "torch.Tensor":
        """The values at scattered places, [n, *shape of the hook]: ``acts.at(*store.locate("my lord"))``.

        Args:
            sequences: sequences, [n], or one for all positions.
            positions: the position of each row in its sequence, [n], or one for all sequences. Negative ones count from
                the last real token back. Where only chosen positions are stored, they are still positions, not slots.

        Raises:
            IndexError: a sequence is outside of the store; or a position is padding, or not stored.
            NotCommittedError: the segment of a row is not committed.
            StorageError: a shard is damaged or cannot be read.
        """
        numbers, wanted = np.broadcast_arrays(
            _integers(sequences, "sequences"), _integers(positions, "positions")
        )
        outside = (numbers < -len(self)) | (numbers >= len(self))
        if outside.any():
            raise IndexError(f"sequence {numbers[outside][0]} is out of bounds for {len(self)} sequences")
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        entries = self._entries.find(numbers, wanted)
        (missing,) = np.nonzero(entries < 0)
        if len(missing):
            raise self._entries.missing(int(numbers[missing[0]]), int(wanted[missing[0]]))
        return self._tensor(self.rows.gather(numbers, entries))

    def _tensor(self, values: NDArray[Any]) -> "torch.Tensor":
        import torch

        return torch.from_numpy(values).view(self.dtype)

    def _masked(self, mask: Any) -> NDArray[Any]:
        """The entries where a mask [n_sequences, entries] is True, in order, [n, *shape of the hook]."""
        chosen = np.asarray(mask)
        if chosen.shape != self.shape[:2]:
            raise IndexError(f"a mask of rows must have shape {self.shape[:2]}, got {chosen.shape}")
        return self.rows.gather(*np.nonzero(chosen))

    def numpy(self, key: Any = ...) -> NDArray[Any]:
        """Read values into a NumPy array, without torch; bfloat16 becomes ``ml_dtypes.bfloat16``."""
        values = self._masked(key) if _is_mask(key) else np.asarray(self.rows[key], order="C")
        if self.rows.dtype == "bfloat16":
            import ml_dtypes

            return values.view(ml_dtypes.bfloat16)
        return values

    @property
    def zarr(self) -> "zarr.Array[Any]":
        """The array through zarr-python; where a store has several parts, that of the first. Rows that are not
        committed show as NaN.
        """
        array: zarr.Array[Any] = self._open_zarr()[self.rows.path]  # type: ignore[assignment]
        return array

    def __repr__(self) -> str:
        return f"<Activations {self.hook} {self.shape} {self.rows.dtype}>"

    def _repr_html_(self) -> str:
        """The same for notebooks, with the name of each axis."""
        from actstore.store.showing.pages import page_of_activations

        return page_of_activations(self.hook, self.axes, self.shape, self.rows.dtype, self.nbytes)


def _is_mask(key: Any) -> bool:
    """Whether an index is an array or a tensor of two axes, which only masks are."""
    return getattr(key, "ndim", 0) == 2 and str(key.dtype).rpartition(".")[2] == "bool"


def _integers(numbers: Any, noun: str) -> NDArray[np.int64]:
    """Numbers of sequences or positions, [n].

    Raises:
        IndexError: they are none.
    """
    listed = np.atleast_1d(np.asarray(numbers))
    if listed.size == 0:
        return np.empty(0, np.int64)
    if listed.ndim != 1 or listed.dtype.kind not in "iu":
        raise IndexError(f"{noun} are given by an integer or a list of integers, not {str(numbers)[:80]}")
    return listed.astype(np.int64)


def _is_last_entry(key: Any, shape: tuple[int, ...]) -> bool:
    """Whether an index names the last entry as -1."""
    if not isinstance(key, tuple) or len(key) < 2:
        return False
    parts = list(key)
    if Ellipsis in [part for part in parts if not isinstance(part, np.ndarray | list)]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    return len(parts) > 1 and type(parts[1]) is int and parts[1] == -1
