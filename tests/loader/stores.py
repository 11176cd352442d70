"""Loaders of small stores, and the values that they must give."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import actstore
from actstore.facade import Store
from actstore.loader.batches.batch_maker import BatchMaker
from actstore.loader.loader import Loader
from actstore.storage.blobs import Blobs
from actstore.store.format.plan import Plan
from actstore.store.records.seal import seal
from tests.store.arrays import bits
from tests.store.example import HOOKS, LENGTH, Columns, N, example_values, write_store

A, B, HEADS = HOOKS
N_ROWS = N * LENGTH


def finished(blobs: Blobs, plan: Plan) -> tuple[Store, Columns]:
    """A store with all of its segments, and the values in it."""
    values = example_values(plan)
    write_store(blobs, plan, values, range(plan.n_segments))
    seal(blobs)
    return actstore.open(blobs.url), values


def rows_of(loader: Loader, epoch: int = 0) -> NDArray[np.int64]:
    """Numbers of all rows of an epoch, according to the loader."""
    places = [loader.rows(k, epoch) for k in range(loader.n_batches)]
    return np.concatenate([sequences * LENGTH + positions for sequences, positions in places])


def check(loader: Loader, hook: str, values: NDArray[Any]) -> None:
    """Check that every row of an epoch comes once, with the values of the store."""
    flat = values.reshape(-1, *values.shape[2:])
    numbers = rows_of(loader)
    np.testing.assert_array_equal(np.sort(numbers), np.arange(len(flat)))
    given = np.concatenate([bits(batch.view(integer(batch)).numpy()) for batch in loader])
    np.testing.assert_array_equal(given, bits(flat)[numbers])


def integer(tensor: torch.Tensor) -> torch.dtype:
    """The integer type of the same size, to compare bits."""
    return {2: torch.int16, 4: torch.int32}[tensor.element_size()]


def maker_of(loader: Loader) -> BatchMaker:
    """The batch maker of a loader that reads storage."""
    assert isinstance(loader._make, BatchMaker)
    return loader._make
