"""A full disk under the cache of a loader: training goes on from the storage itself."""

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import actstore
from actstore.errors import StorageError
from actstore.storage.opening import open_blobs
from actstore.store.records.seal import seal
from tests.faults.test_disk_full import disk, fill
from tests.store.example import HOOKS, example_plan, example_values, write_store

__all__ = ["disk"]


@pytest.mark.parametrize("compression", [None, "lz4"])
@pytest.mark.parametrize("leave", [0, 40 << 10, 200 << 10])
def test_a_full_disk_under_a_cache(
    disk: Path,
    leave: int,
    compression: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = example_plan("float32", compression, n_sequences=500, n_tokens=4_000)
    there = open_blobs(f"memory://{uuid.uuid4().hex}")
    write_store(there, plan, example_values(plan), range(plan.n_segments))
    seal(there)
    store = actstore.open(there.url)
    options: dict[str, Any] = {"batch_size": 64, "shuffle": "window", "window_rows": 600, "epochs": 2}
    expected = [batch.view(torch.int32).clone() for batch in store.loader(HOOKS[0], **options)]
    fill(disk, leave)
    with store.loader(HOOKS[0], cache_dir=disk, **options) as loader:
        for left, right in zip(loader, expected, strict=True):
            assert torch.equal(left.view(torch.int32), right)
    assert len(caplog.records) == 1
    assert "the disk is full" in caplog.text
    assert not list(disk.glob("actstore-shards/*/_actstore/partial/*"))
    if compression is None:
        with pytest.raises(StorageError, match="cannot be written: the disk is full"):
            next(store.loader(HOOKS[0], batch_size=64, cache_dir=disk))
