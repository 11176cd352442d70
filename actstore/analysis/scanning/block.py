"""A block: neighbouring sequences of a store, with the rows of each hook that are not dropped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Block:
    """Rows of some neighbouring sequences; row i of every array and hook is the same token."""

    width: int
    """Entries of a sequence in the store: positions, or slots where only some positions are stored."""
    addresses: NDArray[np.int64]
    """``sequence * width + entry`` of each row, ascending, [n_rows]."""
    tokens: NDArray[np.int32]
    """Token ids, [n_rows]."""
    documents: NDArray[np.int64]
    """Number of the document of each token, -1 for tokens that packing put in, [n_rows]."""
    positions: NDArray[np.int32]
    """Position of each token in its sequence, [n_rows]."""
    n_not_finite: Mapping[str, int]
    """Rows of each hook that hold NaN or infinity. They are left out of the block, for all hooks."""
    read: "Callable[[str], torch.Tensor]"
    known: dict[tuple[str, int], Any] = field(default_factory=dict)
    """Features that were computed of this block, by hook and `id` of what computes them."""

    def __len__(self) -> int:
        return len(self.addresses)

    @cached_property
    def sequences(self) -> NDArray[np.int64]:
        """Number of the sequence of each row, [n_rows]."""
        return self.addresses // self.width

    def values(self, hook: str) -> "torch.Tensor":
        """Values of a hook in its stored dtype, [n_rows, *shape]. Do not write to them: they may be a mapped file."""
        return self.read(hook)

    def features(self, hook: str, features: "Callable[[torch.Tensor], torch.Tensor]") -> "torch.Tensor":
        """Features of the rows, [n_rows, n_features]; several reductions of the same features share them."""
        key = (hook, id(features))
        if key not in self.known:
            self.known[key] = features(self.values(hook))
        return self.known[key]  # type: ignore[no-any-return]


def rows_of(values: "torch.Tensor", kept: NDArray[Any] | None) -> "torch.Tensor":
    """The kept rows of [n_sequences, width, *shape] as [n_rows, *shape]; nothing is copied where all are kept.

    Args:
        values: values of whole sequences.
        kept: places of the rows, counted through the sequences; None for all.
    """
    import torch

    flat = values.flatten(0, 1)
    return flat if kept is None else flat[torch.from_numpy(kept)]
