"""The largest numbers of each row of a matrix, the first of equals first."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def largest(values: "torch.Tensor", k: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """The k largest of each row and their columns, both [n_rows, k], descending. `topk` of torch gives any of equals.

    Args:
        values: finite, [n_rows, n], with n of k or more.
        k: how many.
    """
    import torch

    threshold = values.topk(k, dim=1).values[:, -1:]
    row, column = (values >= threshold).nonzero(as_tuple=True)
    found = values[row, column]
    # Sorted by row, then value, then column: nonzero gives rows and columns in order, and stable sorts keep it.
    order = found.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row, column, found = row[order], column[order], found[order]
    starts = torch.searchsorted(row, torch.arange(len(values)))
    first = torch.arange(len(row)) - starts[row] < k
    return found[first].view(-1, k), column[first].view(-1, k)
