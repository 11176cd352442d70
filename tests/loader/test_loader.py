"""Loaders of small stores: what they give against NumPy, whatever the storage, the shuffle and the number of ranks."""

import gc
import itertools
import json
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import actstore
from actstore.errors import HookError, LoaderError, NotCommittedError, StorageError
from actstore.loader.address_range import AddressRange
from actstore.loader.batch import Batch
from actstore.loader.loader import Loader
from actstore.store.blobs import Blobs, open_blobs
from actstore.store.local import LocalBlobs
from actstore.store.plan import Plan
from actstore.store.seal import seal
from actstore.store.store import Store
from tests.store.arrays import bits
from tests.store.example import HOOKS, LENGTH, Columns, N, example_plan, example_values, write_store
from tests.store.runs import MLP_OUT, hooks_run, tokens_run, write_run

A, B, HEADS = HOOKS
N_ROWS = N * LENGTH


def finished(blobs: Blobs, plan: Plan) -> tuple[Store, Columns]:
    values = example_values(plan)
    write_store(blobs, plan, values, range(plan.n_segments))
    seal(blobs)
    return actstore.open(blobs.url), values


@pytest.fixture(params=["float32", "bfloat16"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Columns]:
    return finished(LocalBlobs(tmp_path / "store"), example_plan(request.param))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return finished(LocalBlobs(tmp_path / "store"), example_plan())[0]


def rows_of(loader: Loader, epoch: int = 0) -> NDArray[np.int64]:
    """Numbers of all rows of an epoch, as the loader says that it gives them."""
    found = [loader.rows(k, epoch) for k in range(loader.n_batches)]
    return np.concatenate([sequences * LENGTH + positions for sequences, positions in found])


def check(loader: Loader, hook: str, values: NDArray[Any]) -> None:
    """Every row of an epoch comes once, as it is in the store."""
    flat = values.reshape(-1, *values.shape[2:])
    numbers = rows_of(loader)
    np.testing.assert_array_equal(np.sort(numbers), np.arange(len(flat)))
    given = np.concatenate([bits(batch.view(_integer(batch)).numpy()) for batch in loader])
    np.testing.assert_array_equal(given, bits(flat)[numbers])


def _integer(tensor: torch.Tensor) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32}[tensor.element_size()]


@pytest.mark.parametrize("shuffle", ["global", "window", None])
@pytest.mark.parametrize("hook", [A, HEADS])
def test_every_row_once(made: tuple[Store, Columns], shuffle: Any, hook: str) -> None:
    store, values = made
    with store.loader(hook, batch_size=10, shuffle=shuffle, window_rows=150) as loader:
        assert (loader.n_rows, loader.n_batches) == (N_ROWS, 30)
        check(loader, hook, values[hook])
        with pytest.raises(StopIteration):
            next(loader)
        if shuffle is None:
            assert (rows_of(loader) == np.arange(N_ROWS)).all()


@pytest.mark.parametrize("shuffle", ["global", "window", None])
def test_without_maps(made: tuple[Store, Columns], shuffle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AddressRange, "fits", staticmethod(lambda _: False))
    store, values = made
    with store.loader(A, batch_size=10, shuffle=shuffle, window_rows=150) as loader:
        check(loader, A, values[A])


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("shuffle", ["window", None])
def test_compressed(tmp_path: Path, compression: str, shuffle: Any) -> None:
    store, values = finished(LocalBlobs(tmp_path / "store"), example_plan("bfloat16", compression))
    with store.loader(A, batch_size=10, shuffle=shuffle, window_rows=150) as loader:
        check(loader, A, values[A])
    with pytest.raises(
        LoaderError, match="is compressed, and shuffle='global' takes single rows from anywhere"
    ):
        next(store.loader(A, batch_size=10))


@pytest.mark.parametrize("shuffle", ["window", None])
def test_other_storage(shuffle: Any) -> None:
    store, values = finished(open_blobs(f"memory://{uuid.uuid4().hex}"), example_plan("bfloat16"))
    with store.loader(A, batch_size=10, shuffle=shuffle, window_rows=150) as loader:
        check(loader, A, values[A])
    with pytest.raises(LoaderError, match="is not on a local disk, .* use shuffle='window'"):
        next(store.loader(A, batch_size=10))


@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_storage_does_not_change_the_order(tmp_path: Path, shuffle: Any) -> None:
    plan = example_plan()
    values = example_values(plan)
    there, here = open_blobs(f"memory://{uuid.uuid4().hex}"), LocalBlobs(tmp_path / "store")
    for blobs in (there, here):
        write_store(blobs, plan, values, range(plan.n_segments))
    loaders = [
        actstore.open(blobs.url).loader(A, batch_size=16, shuffle=shuffle, seed=5) for blobs in (there, here)
    ]
    np.testing.assert_array_equal(rows_of(loaders[0]), rows_of(loaders[1]))


def test_several_hooks_are_aligned(made: tuple[Store, Columns]) -> None:
    store, values = made
    for hooks in ([A, HEADS], "blocks.*.hook_resid_post"):
        loader = store.loader(hooks, batch_size=20, provenance=True)
        for batch in loader:
            assert isinstance(batch, Batch)
            assert isinstance(batch.values, dict)
            for hook, given in batch.values.items():
                expected = bits(values[hook])[batch.sequences.numpy(), batch.positions.numpy()]
                np.testing.assert_array_equal(bits(given.view(_integer(given)).numpy()), expected)
            ids = store.tokens[:][batch.sequences.numpy(), batch.positions.numpy()]
            np.testing.assert_array_equal(batch.tokens.numpy(), ids)
    assert isinstance(next(store.loader([A], batch_size=20)), dict)


@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_provenance_without_maps(store: Store, shuffle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AddressRange, "fits", staticmethod(lambda _: False))
    for batch in store.loader(A, batch_size=50, shuffle=shuffle, window_rows=100, provenance=True):
        ids = store.tokens[:][batch.sequences.numpy(), batch.positions.numpy()]
        np.testing.assert_array_equal(batch.tokens.numpy(), ids)


def test_runs_that_follow_each_other(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    first, second = example_plan(), tokens_run("0001", n_sequences=21, segment_size=16)
    values = [write_run(blobs, first), write_run(blobs, second)]
    seal(blobs)
    store = actstore.open(blobs.url)
    assert store.shape == (N + 21, LENGTH)
    for shuffle in ("global", "window", None):
        with store.loader(HEADS, batch_size=16, shuffle=shuffle, window_rows=200) as loader:
            check(loader, HEADS, np.concatenate([values[0][HEADS], values[1][HEADS]]))


def test_hook_that_is_not_over_all_tokens(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    first = example_plan()
    write_run(blobs, first)
    write_run(blobs, tokens_run("0001"))
    write_run(blobs, hooks_run("0002", MLP_OUT, over=first))
    with pytest.raises(NotCommittedError, match="was not extracted over the tokens of run 0001"):
        next(actstore.open(blobs.url).loader(MLP_OUT, batch_size=4))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_ranks_together_see_what_one_sees(store: Store, world_size: int, shuffle: Any) -> None:
    options: dict[str, Any] = {
        "batch_size": 12,
        "shuffle": shuffle,
        "seed": 1,
        "window_rows": 100,
        "epochs": 2,
    }
    alone = store.loader(A, **options)
    ranks = [store.loader(A, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for batch, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(torch.cat(parts).view(torch.int32), batch.view(torch.int32))


@pytest.mark.parametrize("shuffle", ["global", "window", None])
@pytest.mark.parametrize("rank", [0, 9, 15])
def test_rank_without_a_row_of_the_last_batch(store: Store, shuffle: Any, rank: int) -> None:
    """296 rows: the last batch has 8 of 16."""
    options: dict[str, Any] = {
        "batch_size": 32,
        "shuffle": shuffle,
        "window_rows": 100,
        "rank": rank,
        "world_size": 16,
    }
    given = list(store.loader(HEADS, dtype="float32", provenance=True, **options))
    assert [len(batch.values) for batch in given] == [2] * 9 + [rank % 2]
    assert given[-1].values.shape[1:] == (2, 8)
    assert len(given[-1].tokens) == rank % 2
    # Also when that batch is the first one that is made.
    assert len(store.loader(HEADS, **options).batch(9)) == rank % 2


def test_interrupted_while_waiting(store: Store) -> None:
    """By a signal whose handler raises, while the thread gathers from files that are then unmapped."""
    code = f"""
import signal, time
import actstore
from actstore.loader import address_range
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
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
    )
    assert done.stdout == "interrupted\n"


def test_epochs(store: Store) -> None:
    loader = store.loader(A, batch_size=100, epochs=None, seed=3)
    given = [next(loader) for _ in range(7)]
    assert [len(batch) for batch in given] == [100, 100, 96, 100, 100, 96, 100]
    assert loader.epoch == 2
    assert (rows_of(loader, 0) != rows_of(loader, 1)).any()
    dropped = store.loader(A, batch_size=100, epochs=3, drop_last=True)
    assert [len(batch) for batch in dropped] == [100] * 6


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_resume(store: Store, prefetch: int) -> None:
    options: dict[str, Any] = {"batch_size": 30, "epochs": 2, "seed": 9, "prefetch": prefetch}
    whole = [batch.clone() for batch in store.loader(A, **options)]
    for n_taken in (0, 1, 9, 10, 13, 20):
        loader = store.loader(A, **options)
        taken = list(itertools.islice(loader, n_taken))
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        again = store.loader(A, **options)
        again.load_state_dict(state)
        rest = list(again)
        assert len(taken) + len(rest) == len(whole) == 20
        for left, right in zip([*taken, *rest], whole, strict=True):
            assert torch.equal(left.view(torch.int32), right.view(torch.int32))


def test_resume_with_another_number_of_ranks(store: Store) -> None:
    options: dict[str, Any] = {"batch_size": 30, "seed": 9}
    first = store.loader(A, rank=1, world_size=2, **options)
    next(first), next(first)
    alone = store.loader(A, **options)
    alone.load_state_dict(first.state_dict())
    assert torch.equal(next(alone).view(torch.int32), store.loader(A, **options).batch(2).view(torch.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "with seed 1, and this one has 0"),
        ({"batch_size": 31}, "with batch_size 31, and this one has 30"),
        ({"shuffle": "window"}, "with shuffle 'window', and this one has 'global'"),
        ({"seqpos": [0]}, "with n_rows 37, and this one has 296"),
        ({"drop_last": True}, "with drop_last True, and this one has False"),
    ],
)
def test_state_of_another_order(store: Store, changes: dict[str, Any], message: str) -> None:
    other = store.loader(A, **({"batch_size": 30} | changes))
    with pytest.raises(LoaderError, match=message):
        store.loader(A, batch_size=30).load_state_dict(other.state_dict())


def test_state_of_as_many_other_rows(store: Store) -> None:
    masks = [np.ones(N, bool) for _ in range(2)]
    masks[0][0] = masks[1][1] = False
    loaders = [store.loader(A, batch_size=8, mask=mask) for mask in masks]
    with pytest.raises(LoaderError, match="with rows "):
        loaders[0].load_state_dict(loaders[1].state_dict())


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"version": 1},
        [],
        None,
        {"version": 1, "epoch": 0, "batch": 999, "order": {}},
        {"version": 1, "epoch": 0, "batch": 0, "order": None},
        {"version": 1, "epoch": "0", "batch": 0, "order": {}},
    ],
)
def test_no_state(store: Store, state: Any) -> None:
    with pytest.raises(LoaderError):
        store.loader(A, batch_size=30).load_state_dict(state)


def test_batches_are_the_callers(store: Store) -> None:
    kept = list(store.loader(A, batch_size=10, epochs=3))
    fresh = store.loader(A, batch_size=10, epochs=3, prefetch=0)
    views = [next(fresh)[2:3] for _ in range(20)]
    for batch, view in zip(kept, views, strict=False):
        assert torch.equal(batch[2:3].view(torch.int32), view.view(torch.int32))
    assert len({batch.data_ptr() for batch in kept}) == len(kept)


def test_memory_is_used_again(store: Store) -> None:
    pointers = {
        next(loader).data_ptr() for loader in [store.loader(A, batch_size=8, epochs=None)] for _ in range(50)
    }
    assert len(pointers) <= 5


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["float32", torch.bfloat16])
def test_conversion(tmp_path: Path, stored: str, wanted: Any) -> None:
    store, _ = finished(LocalBlobs(tmp_path / "store"), example_plan(stored))
    plain = store.loader(HEADS, batch_size=100)
    converted = store.loader(HEADS, batch_size=100, dtype=wanted)
    for left, right in zip(plain, converted, strict=True):
        expected = left.to(right.dtype)
        assert right.dtype == (torch.float32 if wanted == "float32" else wanted)
        assert torch.equal(right.nan_to_num(), expected.nan_to_num())
        assert torch.equal(right.isnan(), expected.isnan())


def test_any_batch(store: Store) -> None:
    loader = store.loader(A, batch_size=30, epochs=2)
    given = [batch.clone() for batch in loader]
    for k, epoch in ((3, 0), (0, 1), (9, 1), (0, 0)):
        assert torch.equal(loader.batch(k, epoch).view(torch.int32), given[epoch * 10 + k].view(torch.int32))
    with pytest.raises(IndexError, match="an epoch has batches 0 to 9, not 10"):
        loader.batch(10)


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
    if pid == 0:  # none of the parent's threads are here
        torch.set_num_threads(1)
        is_right = all(torch.equal(next(loader).view(torch.int32), each) for each in expected[1:])
        os._exit(0 if is_right else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert torch.equal(next(loader).view(torch.int32), expected[1])


def test_batches_by_number_while_others_are_made_ahead(store: Store) -> None:
    expected = [batch.view(torch.int32).clone() for batch in store.loader(A, batch_size=8, prefetch=0)]
    loader = store.loader(A, batch_size=8, epochs=None, prefetch=4)
    for k in range(200):
        given, asked = next(loader), loader.batch(k % 37)
        assert torch.equal(asked.view(torch.int32), expected[k % 37])
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
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_metrics(store: Store) -> None:
    loader = store.loader(A, batch_size=30, drop=[0])
    for _ in range(4):
        next(loader)
    found = loader.metrics()
    assert (found.n_batches, found.n_rows, found.nbytes) == (4, 120, 120 * 16 * 4)
    assert found.seconds_gathering > 0
    assert found.seconds_waiting > 0
    assert found.mask_nbytes > 0
    assert found.n_retries == 0


def cut(path: Path) -> None:
    os.truncate(path, 4096)


def test_a_file_that_becomes_shorter_is_an_error(store: Store) -> None:
    loader = store.loader(A, batch_size=N_ROWS, epochs=None, prefetch=0)
    next(loader)
    cut(Path(store.url) / f"acts/{A}/c.1.0.0")
    with pytest.raises(
        StorageError, match=r"c\.1\.0\.0 has become shorter while it was read; .* `actstore verify"
    ):
        next(loader)
    # Not only once: what was zeros must never be taken for values.
    with pytest.raises(StorageError, match="has become shorter"):
        next(loader)


def test_a_file_that_was_shorter_is_an_error(store: Store) -> None:
    cut(Path(store.url) / f"acts/{A}/c.1.0.0")
    with pytest.raises(StorageError, match="is damaged"):
        next(store.loader(A, batch_size=8))


def test_a_file_that_is_gone_is_an_error(store: Store) -> None:
    (Path(store.url) / f"acts/{A}/c.1.0.0").unlink()
    with pytest.raises(StorageError, match="cannot be opened: No such file"):
        next(store.loader(A, batch_size=8))


@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_after_an_error_the_same_batch_comes_again(
    tmp_path: Path, shuffle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shuffle == "window":
        monkeypatch.setattr(AddressRange, "fits", staticmethod(lambda _: False))
    store, values = finished(LocalBlobs(tmp_path / "store"), example_plan())
    path = Path(store.url) / f"acts/{A}/c.1.0.0"
    hidden = path.rename(tmp_path / "hidden")
    loader = store.loader(A, batch_size=8, shuffle=shuffle)
    for _ in range(2):
        with pytest.raises(StorageError, match="cannot be opened|is committed but missing"):
            next(loader)
    hidden.rename(path)
    check(loader, A, values[A])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"shuffle": "local"}, "shuffle is 'local'; it can be 'global', 'window' or None"),
        ({"window_rows": 0}, "window_rows is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2; with world_size 2 it must be from 0 to 1"),
        ({"world_size": 0}, "world_size is 0"),
        ({"batch_size": 2, "world_size": 3}, "batch_size is 2, for all 3 ranks together"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"dtype": "int8"}, "dtype is 'int8'; it can be bfloat16"),
        ({"drop": ["start"]}, "drop names 'start'; it can be 'bos', 'eos', 'sep', 'pad', or token ids"),
        ({"drop": ["bos"]}, "the configuration of the model has no bos_token_id; give the id itself"),
        ({"seqpos": [8]}, r"seqpos is \[8\]; sequences have positions 0 to 7"),
        ({"mask": np.ones((3, 3), bool)}, r"mask is bool of shape \(3, 3\)"),
        ({"mask": np.ones(N, int)}, "mask is int64 of shape"),
        ({"mask": np.zeros(N, bool)}, "all 296 rows of .* are dropped"),
        ({"batch_size": 300, "drop_last": True}, "296 rows of .* are left, fewer than one batch of 300"),
    ],
)
def test_refused(store: Store, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoaderError, match=message):
        store.loader(A, **({"batch_size": 8} | options))


def test_no_hook(store: Store) -> None:
    with pytest.raises(HookError, match="does not hold"):
        store.loader("blocks.7.hook_mlp_out", batch_size=8)
    with pytest.raises(LoaderError, match="no hook was asked for"):
        store.loader([], batch_size=8)


def test_store_that_grows(tmp_path: Path) -> None:
    plan = example_plan()
    write_store(LocalBlobs(tmp_path), plan, example_values(plan), [0, 2])
    with pytest.raises(LoaderError, match=r"is not complete \(2 of 3 segments\)"):
        actstore.open(str(tmp_path)).loader(A, batch_size=8)


def kept(store: Store, **options: Any) -> NDArray[np.bool_]:
    found = np.zeros(N_ROWS, bool)
    found[rows_of(store.loader(A, batch_size=8, **options))] = True
    return found.reshape(N, LENGTH)


Oracle = Callable[[NDArray[Any], NDArray[Any]], NDArray[np.bool_]]


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({"drop": [5, 250, 10**6]}, lambda ids, _: ~np.isin(ids, [5, 250])),
        ({"drop": 7}, lambda ids, _: ids != 7),
        ({"seqpos": slice(1, None)}, lambda ids, at: at >= 1),
        ({"seqpos": [0, -1]}, lambda ids, at: np.isin(at, [0, LENGTH - 1])),
        ({"seqpos": slice(0, 4), "drop": [9]}, lambda ids, at: (at < 4) & (ids != 9)),
        (
            {"mask": np.arange(N) % 2 == 0},
            lambda ids, at: np.broadcast_to(ids[:, :1] // LENGTH % 2 == 0, ids.shape),
        ),
        ({"drop": ["pad"]}, lambda ids, at: np.ones(ids.shape, bool)),
    ],
)
def test_dropped_rows(store: Store, options: dict[str, Any], oracle: Oracle) -> None:
    ids = store.tokens[:]
    positions = np.broadcast_to(np.arange(LENGTH), ids.shape)
    np.testing.assert_array_equal(kept(store, **options), oracle(ids, positions))
    np.testing.assert_array_equal(kept(store, shuffle="window", **options), oracle(ids, positions))


def test_large_norms_are_dropped(store: Store) -> None:
    values = store[A][:]
    norms = values.float().square().sum(-1).sqrt()
    limit = float(norms[norms.isfinite()].median())
    found = kept(store, max_norm=limit)
    np.testing.assert_array_equal(found, (norms <= limit).numpy())
    assert 0 < found.sum() < N_ROWS
