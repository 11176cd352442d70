"""The stored activations of one hook, indexed like a tensor."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.store.reading.rows import Rows
from actstore.store.reading.stored_norms import StoredNorms

if TYPE_CHECKING:
    import torch
    import zarr


class Activations:
    """``acts[sequences, positions, ...]`` reads just those rows and gives a ``torch.Tensor`` in the stored dtype.

    Indices are NumPy's: integers, slices, ``...``, and a list of sequences on the first axis.
    """

    def __init__(
        self, hook: str, rows: Rows, norms: StoredNorms, open_zarr: "Callable[[], zarr.Group]"
    ) -> None:
        """
        Args:
            hook: name of the hook.
            rows: values of the hook.
            norms: norms of these rows.
            open_zarr: opens the store through zarr-python.
        """
        self.hook = hook
        self.rows = rows
        self.norms = norms
        """L2 norms of the rows, float32 [n_sequences, context_length]; NaN for padding."""
        self._open_zarr = open_zarr

    @property
    def shape(self) -> tuple[int, ...]:
        """(sequences, positions, *shape of the hook)."""
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

        Raises:
            IndexError: the index is outside of the array.
            NotCommittedError: the segment of a row is not committed.
            StorageError: a shard is damaged or cannot be read.
        """
        import torch

        tensor = torch.from_numpy(np.asarray(self.rows[key], order="C"))
        return tensor.view(self.dtype) if tensor.ndim else tensor.reshape(1).view(self.dtype)[0]

    def numpy(self, key: Any = ...) -> NDArray[Any]:
        """Read values into a NumPy array, without torch; bfloat16 becomes ``ml_dtypes.bfloat16``."""
        values = np.asarray(self.rows[key], order="C")
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
