"""A batch with what is known of its rows."""

from dataclasses import dataclass

import torch

Values = torch.Tensor | dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Rows of activations, and where each of them comes from."""

    values: Values
    """[n_rows, *shape of the hook]; of several hooks by name, row by row of the same token."""
    sequences: torch.Tensor
    """int64 [n_rows] row of the store."""
    positions: torch.Tensor
    """int64 [n_rows] place in the sequence."""
    tokens: torch.Tensor
    """int64 [n_rows] token ids."""


def tensors_of(batch: Values | Batch) -> list[torch.Tensor]:
    """The values, hook by hook."""
    values = batch.values if isinstance(batch, Batch) else batch
    return [values] if isinstance(values, torch.Tensor) else list(values.values())


def all_tensors_of(batch: Values | Batch) -> list[torch.Tensor]:
    """The values, and where they come from, if the batch says so."""
    origin = [batch.sequences, batch.positions, batch.tokens] if isinstance(batch, Batch) else []
    return [*tensors_of(batch), *origin]
