"""Batches that are copied to a GPU ahead: the same bits, whatever the GPU is busy with meanwhile."""

from pathlib import Path
from typing import Any

import pytest
import torch

from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from tests.loader.stores import HEADS, A, finished, maker_of
from tests.store.example import Columns, example_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Store, Columns]:
    return finished(LocalBlobs(tmp_path / "store"), example_plan("bfloat16"))


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_equal_to_those_in_host_memory(made: tuple[Store, Columns], dtype: Any, prefetch: int) -> None:
    options: dict[str, Any] = {"batch_size": 16, "dtype": dtype, "prefetch": prefetch, "epochs": 20}
    store, _ = made
    hooks = [A, HEADS]
    there = store.loader(hooks, **options, device="cuda")
    for here, moved in zip(store.loader(hooks, **options), there, strict=True):
        for hook in hooks:
            assert moved[hook].is_cuda
            torch.testing.assert_close(moved[hook].cpu(), here[hook], rtol=0, atol=0, equal_nan=True)


def test_memory_is_not_used_again_while_the_gpu_has_work_with_it(made: tuple[Store, Columns]) -> None:
    store, _ = made
    here = list(store.loader(A, batch_size=64, epochs=20, dtype="float32"))
    busy = torch.randn(4096, 4096, device="cuda")
    found = []
    for batch in store.loader(A, batch_size=64, epochs=20, dtype="float32", device="cuda"):
        for _ in range(20):  # what is found comes long after nobody holds the batch
            busy = (busy @ busy).clamp(-1, 1)
        found.append(_largest(batch))
        del batch
    for there, batch in zip(found, here, strict=True):
        assert torch.equal(there.cpu(), _largest(batch))


def _largest(batch: torch.Tensor) -> torch.Tensor:
    return batch.nan_to_num().amax(0)


def test_host_memory_is_pinned_and_used_again(made: tuple[Store, Columns]) -> None:
    store, _ = made
    loader = store.loader(A, batch_size=64, device="cuda", prefetch=0, epochs=20)
    for _ in loader:
        pass
    memories = [memory for kept in maker_of(loader)._buffers[A]._memories.values() for memory in kept]
    assert len(memories) == 2  # of a batch, and of the smaller last one
    assert all(torch.from_numpy(memory).is_pinned() for memory in memories)
