"""A batch of rows, and what is known of each row."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    import torch


Values = Union["torch.Tensor", dict[str, "torch.Tensor"]]


@dataclass(frozen=True)
class Batch:
    """Rows of activations, and where each of them comes from."""

    values: Values
    """[n_rows, *shape of the hook] for one hook; for several, a dict by hook name in which row i is the same token
    everywhere.
    """
    sequences: "torch.Tensor"
    """The sequence of each row in the store, int64 [n_rows]."""
    positions: "torch.Tensor"
    """The position of each row in its sequence, int64 [n_rows]."""
    tokens: "torch.Tensor"
    """The token ids of the rows, int64 [n_rows]."""


def tensors_of(batch: Values | Batch) -> "list[torch.Tensor]":
    """The values of a batch, one tensor per hook."""
    values = batch.values if isinstance(batch, Batch) else batch
    return list(values.values()) if isinstance(values, dict) else [values]


def all_tensors_of(batch: Values | Batch) -> "list[torch.Tensor]":
    """The values of a batch, then the origin of its rows if the batch holds it."""
    origin = [batch.sequences, batch.positions, batch.tokens] if isinstance(batch, Batch) else []
    return [*tensors_of(batch), *origin]
