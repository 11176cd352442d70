"""Loaders in several threads and processes, and how they end."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.loader.batches.batch_maker import BatchMaker
from actstore.loader.loader import Loader
from actstore.loader.prefetch import Prefetch
from actstore.loader.rows import window_rows
from actstore.loader.rows.window_rows import WindowRows
from actstore.storage.blobs import BlobInfo, BlobReader, Bytes, Distant
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from tests.commands import command
from tests.loader.stores import A, finished, maker_of
from tests.loader.test_prefetch import check_ended
from tests.store.example import HOOKS, example_plan


def test_interrupted_while_waiting(store: Store) -> None:
    """A signal handler raises while the thread gathers from files, which are then unmapped."""
    code = f"""
import signal, time
import actstore
from actstore.loader.rows import address_range
select = address_range.select

def slow(*args):
    for _ in range(100):
        select(*args)
        time.sleep(0.01)

address_range.select = slow
signal.signal(signal.SIGALRM, signal.default_int_handler)
try:
    with actstore.open({store.url!r}).loader({A!r}, batch_size=200, epochs=None) as loader:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        while True:
            next(loader)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = command(code=code, timeout=120)
    assert done.stdout == "interrupted\n", done.stderr


def test_other_process(store: Store) -> None:
    loader = store.loader(A, batch_size=30)
    next(loader)
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.state_dict() == loader.state_dict()
    expected = store.loader(A, batch_size=30).batch(1).view(torch.int32)
    assert torch.equal(next(copy).view(torch.int32), expected)


@pytest.mark.parametrize(("compression", "shuffle"), [(None, "global"), ("lz4", "window")])
def test_forked_process(tmp_path: Path, compression: Any, shuffle: Any) -> None:
    store, _ = finished(LocalBlobs(tmp_path / "store"), example_plan("float32", compression))
    options: dict[str, Any] = {"batch_size": 30, "shuffle": shuffle, "window_rows": 100, "prefetch": 1}
    expected = [batch.view(torch.int32).clone() for batch in store.loader(A, **options)]
    loader = store.loader(A, **options)
    next(loader)
    pid = os.fork()
    if pid == 0:  # none of the parent's threads exist here
        is_right = all(torch.equal(next(loader).view(torch.int32), rows) for rows in expected[1:])
        os._exit(0 if is_right else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert torch.equal(next(loader).view(torch.int32), expected[1])


def test_closed_in_a_forked_process(store: Store) -> None:
    """A thread of the parent may hold the lock; it does not exist in the child to release it."""
    loader = store.loader(A, batch_size=30)
    next(loader)
    with maker_of(loader)._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            loader.close()
            os._exit(0 if len(next(loader)) == 30 else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("place", [(BatchMaker, "hand_over"), (Prefetch, "close")])
def test_interrupted_at_a_bad_moment(
    store: Store, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str]
) -> None:
    """The interruption comes while a batch is handed over, or again while the first one waits for the thread."""
    expected = [batch.view(torch.int32).clone() for batch in store.loader(A, batch_size=30)]
    loader = store.loader(A, batch_size=30)
    for _ in range(4):
        next(loader)

    def interrupted(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            loader.close() if place[1] == "close" else next(loader)
    given = list(loader)
    assert len(given) == 6
    assert all(torch.equal(a.view(torch.int32), b) for a, b in zip(given, expected[4:], strict=True))


def test_batches_by_number_while_others_are_made_ahead(store: Store) -> None:
    expected = [batch.view(torch.int32).clone() for batch in store.loader(A, batch_size=8, prefetch=0)]
    loader = store.loader(A, batch_size=8, epochs=None, prefetch=4)
    for k in range(200):
        given, by_number = next(loader), loader.batch(k % 37)
        assert torch.equal(by_number.view(torch.int32), expected[k % 37])
        assert k >= 37 or torch.equal(given.view(torch.int32), expected[k])


def test_a_loader_that_nobody_holds_ends_its_thread_and_its_maps(store: Store) -> None:
    loader = store.loader(A, batch_size=8, epochs=None)
    next(loader)
    assert loader._ahead is not None
    thread = loader._ahead._thread
    assert store.url in Path("/proc/self/maps").read_text()
    del loader
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    assert store.url not in Path("/proc/self/maps").read_text()


def test_a_process_that_ends_in_the_middle(store: Store) -> None:
    code = f"""
import actstore
store = actstore.open({store.url!r})
loaders = [store.loader({A!r}, batch_size=200, epochs=None, prefetch=3) for _ in range(4)]
for loader in loaders:
    next(loader)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_forked_after_many_threads(store: Store) -> None:
    """OpenMP waits for its threads, none of which exist in a forked process."""
    code = f"""
import multiprocessing
import torch
import actstore

torch.set_num_threads(4)
rows = torch.zeros(100_000, 64)
torch.index_select(rows, 0, torch.arange(100_000))
loader = actstore.open({store.url!r}).loader({A!r}, batch_size=296, epochs=None)
expected = loader.batch(0).clone()

def read():
    # Nothing else is needed there: the loader sees to it, also for what comes after.
    assert torch.equal(next(loader).view(torch.int32), expected.view(torch.int32))
    assert torch.index_select(rows, 0, torch.arange(100_000)).sum() == 0

child = multiprocessing.get_context("fork").Process(target=read, daemon=True)
child.start()
child.join(60)
print(child.exitcode, torch.get_num_threads())
child.kill()
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=180, capture_output=True, text=True, env=environment
    )
    assert done.stdout == "0 4\n", done.stderr


class Blocked(Distant):
    """Blobs that give shards only once they are allowed to."""

    def __init__(self, blobs: BlobReader) -> None:
        self._blobs = blobs
        self.go = threading.Event()
        self.requested = threading.Semaphore(0)
        self.keys: list[str] = []

    @property
    def url(self) -> str:
        return self._blobs.url

    @property
    def n_retries(self) -> int:
        return 0

    def read(self, key: str, start: int = 0, nbytes: int | None = None) -> Bytes:
        return self._blobs.read(key, start, nbytes)

    def read_into(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        self.keys.append(key)
        self.requested.release()
        assert self.go.wait(60)
        self._blobs.read_into(key, start, out)

    def head(self, key: str) -> BlobInfo | None:
        return self._blobs.head(key)


def blocked_loader(monkeypatch: pytest.MonkeyPatch) -> tuple[Loader, Blocked]:
    """A loader with windows of three shards, which are requested one at a time."""
    monkeypatch.setattr(window_rows, "N_REQUESTS", 1)
    store, _ = finished(open_blobs(f"memory://{uuid.uuid4().hex}"), example_plan())
    loader = store.loader([A, HOOKS[1]], batch_size=8, shuffle="window", epochs=None)
    blocked = Blocked(store[A].rows.blobs)
    arrays = maker_of(loader)._arrays
    arrays.update({name: rows.over(blocked) for name, rows in arrays.items()})
    return loader, blocked


def check_ends_soon(
    end: Callable[[], None], make: BatchMaker, blocked: Blocked, *, waits: bool = True
) -> None:
    for _ in range(2):
        assert blocked.requested.acquire(timeout=20)  # one request for each hook is under way
    windows: list[Any] = []
    while len(windows) < 2:  # the request can be under way before its window is registered
        sources = [source for source in tuple(make._sources.values()) if isinstance(source, WindowRows)]
        windows = [held for source in sources for held in tuple(source._held.values())]
    ending = threading.Thread(target=end)
    ending.start()
    for held in windows:
        assert held.stop.wait(20)
    # Memory that is written to must not be freed.
    assert not waits or ending.is_alive()
    blocked.go.set()
    check_ended(ending)
    assert len(blocked.keys) == 2


@pytest.mark.parametrize("is_closed", [True, False])
def test_the_end_does_not_wait_for_a_whole_window(monkeypatch: pytest.MonkeyPatch, is_closed: bool) -> None:
    loader, blocked = blocked_loader(monkeypatch)
    make, ahead = maker_of(loader), Prefetch(loader._from_here(), 2, maker_of(loader).interrupt)
    loader._ahead = ahead
    if is_closed:
        check_ends_soon(loader.close, make, blocked)
        assert len(next(loader)[A]) == 8  # the loader can be used again
        loader.close()
    else:
        held = [loader]
        del loader, ahead
        check_ends_soon(held.clear, make, blocked, waits=False)
        make.close()


def test_a_batch_of_a_loader_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    loader, blocked = blocked_loader(monkeypatch)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            loader.batch(0)
        except LoaderError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    check_ends_soon(loader.close, maker_of(loader), blocked)
    check_ended(asking)
    assert "the loader was closed" in str(errors[0])
