"""Batches on a device. Every machine has the device "meta", whose tensors have shape and type but no values."""

from typing import Any

import pytest
import torch

from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.loader.batches.batch import Batch
from tests.loader.stores import HEADS, A, integer
from tests.store.example import Columns


def test_the_cpu_is_no_device_to_copy_to(made: tuple[Store, Columns]) -> None:
    store, _ = made
    plain, on_cpu = (next(store.loader(A, batch_size=8, device=device)) for device in (None, "cpu"))
    assert on_cpu.device == plain.device == torch.device("cpu")
    assert torch.equal(on_cpu.view(integer(on_cpu)), plain.view(integer(plain)))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_all_of_a_batch_is_there(made: tuple[Store, Columns], dtype: Any) -> None:
    store, _ = made
    options: dict[str, Any] = {"batch_size": 8, "dtype": dtype, "provenance": True}
    plain, moved = (next(store.loader([A, HEADS], **options, device=device)) for device in (None, "meta"))
    assert isinstance(plain, Batch)
    assert isinstance(moved, Batch)
    assert isinstance(plain.values, dict)
    assert isinstance(moved.values, dict)
    pairs = [(plain.values[hook], moved.values[hook]) for hook in (A, HEADS)]
    pairs += [(getattr(plain, name), getattr(moved, name)) for name in ("sequences", "positions", "tokens")]
    for here, there in pairs:
        assert there.device.type == "meta"
        assert (there.shape, there.dtype) == (here.shape, here.dtype)


def test_rank_without_rows(store: Store) -> None:
    loader = store.loader(HEADS, batch_size=59, rank=0, world_size=59, device="meta")
    last = loader.batch(loader.n_batches - 1)
    assert last.device.type == "meta"
    assert last.shape == (0, *store[HEADS].shape[2:])


@pytest.mark.parametrize("device", ["gpu", 1.5])
def test_no_device(store: Store, device: Any) -> None:
    with pytest.raises(LoaderError, match=r"device is .*; it can be 'cpu', 'cuda', 'cuda:1' and so on"):
        store.loader(A, batch_size=8, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_here(store: Store) -> None:
    with pytest.raises(LoaderError, match="device is 'cuda', and torch .* cannot use it here"):
        store.loader(A, batch_size=8, device="cuda")
