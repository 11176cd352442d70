"""The worker alone: what it does when a write fails, and which models it refuses."""

import shutil
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import actstore
from actstore.errors import JobError, ModelError, StorageError
from actstore.extraction.claim import claim
from actstore.extraction.worker import SEGMENTS_IN_FLIGHT, WorkerSpec
from actstore.store.local import LocalBlobs
from actstore.store.shard import Bytes

Fields = dict[str, Any]


class TroubledDisk(LocalBlobs):
    """Fails the first write of one hook while the write of another is held up."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.failed, self.held, self.go_on = threading.Event(), threading.Event(), threading.Event()

    def create(self, key: str, parts: Iterable[Bytes], *, metadata: Mapping[str, str] | None = None) -> bool:
        if key.startswith("acts/blocks.0.hook_resid_post/c.0.") and not self.failed.is_set():
            self.failed.set()
            raise StorageError("the disk had a bad moment")
        if key.startswith("acts/blocks.2.hook_resid_post/c.0."):
            self.held.set()
            assert self.go_on.wait(60)
        return super().create(key, parts, metadata=metadata)


def test_memory_is_not_reused_while_it_is_still_being_written(fields: Fields) -> None:
    run = actstore.plan(**fields)
    claim(run.blobs, run.plan)
    assert run.packed is not None
    run.packed.store(run.blobs, run.plan)
    worker = WorkerSpec(fields["out"], fields["model"]).start()
    disk = TroubledDisk(fields["out"])
    worker._writer._blobs = disk
    with ThreadPoolExecutor(1) as thread:
        segment = thread.submit(worker.run, 0)
        assert disk.failed.wait(60)
        assert disk.held.wait(60)
        assert worker._free.qsize() == SEGMENTS_IN_FLIGHT - 1
        disk.go_on.set()
        with pytest.raises(StorageError, match="bad moment"):
            segment.result()
    assert worker._free.qsize() == SEGMENTS_IN_FLIGHT
    worker.close()


def test_a_checkpoint_that_lacks_weights_is_refused(fields: Fields, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(fields["model"], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .* such as layers\.0\.mlp\.up_proj\.weight"):
        actstore.extract(actstore.plan(**fields | {"model": str(folder)}))


def test_shards_of_a_half_deleted_store_are_not_taken_for_our_own(fields: Fields) -> None:
    actstore.extract(actstore.plan(**fields))
    shutil.rmtree(Path(fields["out"], "_actstore"))
    with pytest.raises(
        StorageError, match="has no plan for acts/blocks.0.hook_resid_post but holds shards of it"
    ):
        actstore.plan(**fields)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta"])
def test_an_unknown_device_is_told_before_anything_is_written(fields: Fields, device: str) -> None:
    with pytest.raises(JobError, match="is not known; choose cpu, cuda"):
        actstore.plan(**fields, device=device)
    assert not Path(fields["out"]).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_anything_is_written(fields: Fields) -> None:
    with pytest.raises(JobError, match="torch finds no GPU on this machine; choose cpu"):
        actstore.extract(actstore.plan(**fields, device="cuda"))
    assert not Path(fields["out"]).exists()


def test_the_folder_of_the_user_stays(fields: Fields) -> None:
    Path(fields["out"]).mkdir()
    actstore.plan(**fields)
    assert list(Path(fields["out"]).iterdir()) == []
