"""The worker alone: a write that fails, models that it refuses, and what its forwards depend on."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import actstore
from actstore.errors import JobError, ModelError, StorageError
from actstore.extraction.claim import claim
from actstore.extraction.computing.worker import SEGMENTS_IN_FLIGHT, Worker, WorkerSpec
from actstore.hooks.capture.visitor import Sink
from actstore.storage.blobs import BlobInfo, Bytes
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import commit_key, read_commit

Fields = dict[str, Any]


class TroubledDisk(LocalBlobs):
    """Storage that fails the first write of one hook while the write of another is held up."""

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


@pytest.fixture
def worker(fields: Fields) -> Iterator[Worker]:
    """The plan of a store that has its tokens, and no segment."""
    run = actstore.plan(**fields)
    claim(run.blobs, run.plan)
    assert run.packed is not None
    run.packed.store(run.blobs, run.plan)
    started = WorkerSpec(fields["out"], fields["model"]).start()
    yield started
    started.close()


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_worker_checks_the_segment_that_it_begins_with(
    worker: Worker, fields: Fields, monkeypatch: pytest.MonkeyPatch, is_wrong: bool
) -> None:
    """A worker checks its first segment even if it is not the first of the run, and does not record that."""
    hook = "blocks.1.hook_mlp_out"
    run = worker._model.run

    def run_with_a_fault(tokens: torch.Tensor, hooks: Sequence[str], sink: Sink) -> None:
        run(tokens, hooks, lambda name, value: sink(name, value.roll(1, 1) if name == hook else value))

    if is_wrong:
        monkeypatch.setattr(worker._model, "run", run_with_a_fault)
        with pytest.raises(ModelError, match=f"^{hook} of sequence .* was captured .* was not committed"):
            worker.run(3)
        assert not (Path(fields["out"]) / commit_key("0000", 3)).exists()
        return
    assert worker.run(3).is_new
    record = read_commit(LocalBlobs(fields["out"]), worker._plan, 3)
    assert record.golden is None
    monkeypatch.setattr(worker._model, "run", run_with_a_fault)
    worker.run(4)  # only the first: another forward for each would take as long as the run


class SlowToFind(LocalBlobs):
    """Storage that is slow to say that the first segment is missing, so that other calls get ahead of its forward."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.is_asked = threading.Event()

    def head(self, key: str) -> BlobInfo | None:
        if key == commit_key("0000", 0) and not self.is_asked.is_set():
            self.is_asked.set()
            time.sleep(1.0)
        return super().head(key)


def test_the_first_segment_is_computed_first(worker: Worker, fields: Fields) -> None:
    """It is always checked; another segment before it would be checked as well, with two more forwards."""
    seen: list[tuple[int, ...]] = []
    worker._model.base.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda _module, args: seen.append(tuple(args[0].shape))
    )
    disk = SlowToFind(fields["out"])
    worker._blobs = disk
    with ThreadPoolExecutor(SEGMENTS_IN_FLIGHT) as threads:
        first = threads.submit(worker.run, 0)
        assert disk.is_asked.wait(60)
        others = [threads.submit(worker.run, index) for index in (1, 2)]
        assert all(done.result().is_new for done in (first, *others))
    assert seen == [(8, 32)] * 6  # the whole model, which the first is compared with, is another one


def test_a_worker_that_is_interrupted_while_it_loads_stops_loading(fields: Fields) -> None:
    """Python waits for all threads before it exits, and a large model takes minutes to load."""
    run = actstore.plan(**fields)
    claim(run.blobs, run.plan)
    before = set(threading.enumerate())
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    threading.setprofile(lambda *_: time.sleep(0.001))  # the load takes minutes instead of a second
    try:
        signal.setitimer(signal.ITIMER_REAL, 2.0)
        with pytest.raises(KeyboardInterrupt):
            WorkerSpec(fields["out"], fields["model"]).start()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        threading.setprofile(None)
        signal.signal(signal.SIGALRM, handler)
    started = [thread for thread in threading.enumerate() if thread not in before]
    deadline = time.monotonic() + 20.0
    for thread in started:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert [thread.name for thread in started if thread.is_alive()] == []


ONE_POOL = """
import os, sys
import torch
from actstore.extraction.computing.worker import WorkerSpec
worker = WorkerSpec(*sys.argv[1:]).start()
worker.run(0)
def n_threads(): return len(os.listdir("/proc/self/task"))
before = n_threads()
torch.ones(1 << 20).mul(2.0)
print("made", n_threads() - before)
worker.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of the process")
def test_the_forward_has_the_only_pool_of_threads(worker: Worker, fields: Fields) -> None:
    """Only then do threads wait for each other without sleeping. So the thread that makes the worker makes no pool."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_POOL, fields["out"], fields["model"]],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("made 1\n", 0), done.stderr


def test_every_forward_has_the_shape_of_the_plan(worker: Worker) -> None:
    """Kernels choose their order of summation by the shape, so the last bits of a row depend on it."""
    seen: list[tuple[int, ...]] = []
    handle = worker._model.base.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda _module, args: seen.append(tuple(args[0].shape))
    )
    last = worker._plan.n_segments - 1
    assert worker._plan.segment(last).n_sequences % 8
    worker.run(3)
    del seen[:]
    worker.run(last)
    handle.remove()
    assert seen == [(8, 32)]


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


def test_what_a_worker_records_is_what_it_stores(fields: Fields) -> None:
    """Statistics are those of each segment's real tokens only, even where the last batch is filled up."""
    fields |= {"packing": "document", "truncate": "right", "pad_token": "eos"}
    run = actstore.plan(**fields)
    claim(run.blobs, run.plan)
    assert run.packed is not None
    run.packed.store(run.blobs, run.plan)
    last = run.plan.n_segments - 1
    assert run.plan.segment(last).n_sequences % run.plan.request.batch_size
    worker = WorkerSpec(fields["out"], fields["model"]).start()
    for index in (1, 2, last):
        worker.run(index)
    worker.close()
    store, blobs = actstore.open(fields["out"]), LocalBlobs(fields["out"])
    for index in (1, 2, last):
        segment, record = run.plan.segment(index), read_commit(blobs, run.plan, index)
        rows = slice(segment.start, segment.stop)
        lengths = store.lengths[rows]
        assert lengths.min() < 32
        is_real = np.arange(32) < lengths[:, None]
        assert record.n_tokens == is_real.sum()
        for hook, statistics in record.statistics.items():
            tokens = store[hook][rows].double().numpy()[is_real]
            assert statistics.count == len(tokens)
            assert statistics.max_abs == np.abs(tokens).max()
            total, _ = statistics.arrays(tokens.shape[1:])
            np.testing.assert_allclose(total, tokens.sum(0), rtol=1e-10, atol=1e-8)
