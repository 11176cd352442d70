"""Loaders of small stores compared with NumPy, for every kind of storage and shuffle and several numbers of ranks."""

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actstore
from actstore.errors import HookError, LoaderError, NotCommittedError
from actstore.facade import Store
from actstore.loader.batches.batch import Batch
from actstore.loader.rows.address_range import AddressRange
from actstore.loader.rows.buffers import Buffers
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.records.seal import seal
from tests.loader.stores import HEADS, N_ROWS, A, check, finished, integer, rows_of
from tests.store.arrays import bits
from tests.store.example import HOOKS, LENGTH, Columns, N, example_plan, example_values, write_store
from tests.store.runs import MLP_OUT, hooks_run, tokens_run, write_run


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
                np.testing.assert_array_equal(bits(given.view(integer(given)).numpy()), expected)
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


def test_while_another_hook_is_added(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    first = example_plan()
    values = write_run(blobs, first)
    write_run(blobs, hooks_run("0001", MLP_OUT, over=first), [0])
    store = actstore.open(blobs.url)
    assert not store.is_complete
    with store.loader(A, batch_size=16) as loader:
        check(loader, A, values[A])
    for hooks in (MLP_OUT, [A, MLP_OUT]):
        with pytest.raises(LoaderError, match="is not complete"):
            store.loader(hooks, batch_size=16)


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
    """There are 296 rows, so the last batch has 8 of 16."""
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
    # Also if that batch is the first one that is made.
    assert len(store.loader(HEADS, **options).batch(9)) == rank % 2


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


@pytest.mark.parametrize("prefetch", [0, 2, 8])
def test_memory_of_several_hooks_is_used_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    made: list[int] = []
    new = Buffers._new

    def counted(self: Buffers, nbytes: int) -> Any:
        made.append(nbytes)
        return new(self, nbytes)

    monkeypatch.setattr(Buffers, "_new", counted)
    loader = store.loader(list(HOOKS), batch_size=8, epochs=None, prefetch=prefetch)
    for _ in range(200):
        next(loader)
    assert len(made) <= len(HOOKS) * (prefetch + 3)


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


def test_metrics(store: Store) -> None:
    loader = store.loader(A, batch_size=30, drop=[0])
    for _ in range(4):
        next(loader)
    metrics = loader.metrics()
    assert (metrics.n_batches, metrics.n_rows, metrics.nbytes) == (4, 120, 120 * 16 * 4)
    assert metrics.seconds_gathering > 0
    assert metrics.seconds_waiting > 0
    assert metrics.mask_nbytes > 0
    assert metrics.n_retries == 0
    assert (metrics.nbytes_read, metrics.n_cache_hits, metrics.n_cache_misses) == (0, 0, 0)


def test_metrics_of_windows(tmp_path: Path) -> None:
    """Three shards are all read in each epoch, and fetched in the first one."""
    store, _ = finished(open_blobs(f"memory://{uuid.uuid4().hex}"), example_plan())
    nbytes = 2 * N_ROWS * 16 * 4
    options: dict[str, Any] = {"batch_size": 30, "shuffle": "window", "window_rows": 100, "epochs": 2}
    with store.loader(A, **options) as loader:
        assert len(list(loader)) == 20
        assert loader.metrics().nbytes_read == nbytes
    assert loader.metrics().nbytes_read == nbytes  # also after it is closed
    with store.loader(A, cache_dir=tmp_path, **options) as loader:
        assert len(list(loader)) == 20
        metrics = loader.metrics()
        assert (metrics.n_cache_hits, metrics.n_cache_misses) == (3, 3)


def test_two_names_of_one_tensor(store: Store) -> None:
    alias = "blocks.1.hook_resid_pre"
    assert isinstance(next(store.loader(alias, batch_size=8)), torch.Tensor)
    for hooks in ([A, alias], [alias, A], [alias], [alias, "blocks.0.*"]):
        assert list(next(store.loader(hooks, batch_size=8))) == [A]


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
        ({"batch_size": 8.0}, "batch_size is 8.0; it must be an integer"),
        ({"dtype": "int8"}, "dtype is 'int8'; it can be bfloat16"),
        (
            {"drop": ["start"]},
            "drop names 'start'; it can be 'bos', 'eos', 'sep', 'pad', 'nonfinite', or token ids",
        ),
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
    with pytest.raises(LoaderError, match="no hook is named"):
        store.loader([], batch_size=8)


def test_store_that_grows(tmp_path: Path) -> None:
    plan = example_plan()
    write_store(LocalBlobs(tmp_path), plan, example_values(plan), [0, 2])
    with pytest.raises(LoaderError, match=r"is not complete \(2 of 3 segments\)"):
        actstore.open(str(tmp_path)).loader(A, batch_size=8)
