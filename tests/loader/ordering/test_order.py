"""The order of rows: each once per epoch, however they are shuffled, and the same batches for any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actstore.loader.ordering.order import Batches, GlobalShuffle, InOrder, Order, WindowShuffle


def epoch_of(order: Order, n: int, epoch: int = 0) -> NDArray[np.int64]:
    return order(epoch, np.arange(n))


def shards(*counts: int) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)])


@given(
    n=st.integers(1, 500),
    batch_size=st.integers(1, 60),
    world_size=st.integers(1, 9),
    drop_last=st.booleans(),
)
def test_ranks_share_the_same_batches(n: int, batch_size: int, world_size: int, drop_last: bool) -> None:
    alone = Batches(n, batch_size, drop_last)
    ranks = [Batches(n, batch_size, drop_last, rank, world_size) for rank in range(world_size)]
    seen = []
    for k in range(alone.n_batches):
        parts = [place for rank in ranks for place in rank[k]]
        assert parts == list(alone[k])
        sizes = {len(rank[k]) for rank in ranks}
        assert max(sizes) - min(sizes) <= 1
        seen += parts
    assert seen == list(range(n // batch_size * batch_size if drop_last else n))


@pytest.mark.parametrize("k", [-1, 3])
def test_no_such_batch(k: int) -> None:
    with pytest.raises(IndexError, match="an epoch has batches 0 to 2, not"):
        Batches(25, 10)[k]


def test_global_shuffle() -> None:
    order = GlobalShuffle(10_000, seed=3)
    epochs = [epoch_of(order, 10_000, epoch) for epoch in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10_000))
    assert (epochs[0] == epochs[1]).sum() < 10
    np.testing.assert_array_equal(epoch_of(GlobalShuffle(10_000, seed=3), 10_000, 1), epochs[1])
    assert (epoch_of(GlobalShuffle(10_000, seed=4), 10_000) == epochs[0]).sum() < 10


def test_in_order() -> None:
    order = InOrder(shards(4, 0, 6), np.array([4, 8, 6]))
    np.testing.assert_array_equal(epoch_of(order, 10, 7), np.arange(10))
    (window,) = order.windows(7)
    assert (window.shards.tolist(), window.start, window.stop) == ([0, 2], 0, 10)
    many = InOrder(shards(*[40_000] * 10), np.full(10, 40_000)).windows(0)
    assert [window.shards.tolist() for window in many] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=60).filter(any),
    dropped=st.lists(st.integers(0, 50), min_size=60, max_size=60),
    window_rows=st.integers(1, 500),
    seed=st.integers(0, 2**64 - 1),
)
def test_windows(counts: list[int], dropped: list[int], window_rows: int, seed: int) -> None:
    starts = shards(*counts)
    stored = np.add(counts, dropped[: len(counts)], dtype=np.int64)
    order = WindowShuffle(starts, stored, seed, window_rows)
    n = sum(counts)
    for epoch in (0, 1):
        rows = epoch_of(order, n, epoch)
        np.testing.assert_array_equal(np.sort(rows), np.arange(n))
        windows = order.windows(epoch)
        assert [window.start for window in windows] == [0, *(window.stop for window in windows[:-1])]
        assert windows[-1].stop == n
        used = np.concatenate([window.shards for window in windows])
        np.testing.assert_array_equal(np.sort(used), np.flatnonzero(counts))
        largest, total = stored[used].max(), stored[used].sum()
        for window in windows:
            # A window is full of whole shards, and of nothing else.
            assert abs(stored[window.shards].sum() - total / len(windows)) < max(largest, len(windows) == 1)
            wanted = [row for shard in window.shards for row in range(starts[shard], starts[shard + 1])]
            assert sorted(rows[window.start : window.stop]) == sorted(wanted)


@settings(deadline=None)
@given(
    shard_rows=st.integers(1, 300),
    n_shards=st.integers(1, 200),
    window_rows=st.integers(1, 2_000),
    share=st.integers(1, 100),
)
def test_rows_in_a_window(shard_rows: int, n_shards: int, window_rows: int, share: int) -> None:
    """A window counts dropped rows, too, since they are read with the others."""
    valid = -(-shard_rows // share)
    order = WindowShuffle(shards(*[valid] * n_shards), np.full(n_shards, shard_rows), 0, window_rows)
    sizes = [len(window.shards) * shard_rows for window in order.windows(0)]
    total = n_shards * shard_rows
    assert max(sizes) - min(sizes) <= shard_rows
    assert min(sizes) >= min(window_rows, total)
    # With one window more, some of them would have too few.
    assert total < (len(sizes) + 1) * -(-window_rows // shard_rows) * shard_rows
    if len(sizes) * shard_rows >= window_rows:
        assert max(sizes) < window_rows + 2 * shard_rows


def test_golden_windows() -> None:
    """The windows are the same in every release: shards of two sizes, some without a valid row."""
    stored = np.array([64, 64, 64, 20, 64, 64, 64, 64, 64, 8])
    starts = shards(60, 0, 64, 20, 10, 64, 0, 1, 30, 8)
    windows = WindowShuffle(starts, stored, seed=5, window_rows=100).windows(0)
    assert [window.shards.tolist() for window in windows] == [[3, 7, 2], [4, 5], [9, 8, 0]]
    rows = epoch_of(WindowShuffle(starts, stored, seed=5, window_rows=100), 257)
    assert rows[::32].tolist() == [93, 92, 115, 193, 217, 46, 249, 25, 228]


def test_windows_do_not_depend_on_which_places_are_asked_for() -> None:
    order = WindowShuffle(shards(*[100] * 40), np.full(40, 100), seed=1, window_rows=700)
    whole = epoch_of(order, 4_000)
    places = np.random.default_rng(0).integers(0, 4_000, 999)
    np.testing.assert_array_equal(order(0, places), whole[places])


def test_shards_of_a_window_are_far_apart() -> None:
    order = WindowShuffle(shards(*[64] * 1_000), np.full(1_000, 64), seed=0, window_rows=640)
    firsts = [window.shards for window in order.windows(0)]
    assert len(firsts) == 100
    assert np.mean([shards.max() - shards.min() for shards in firsts]) > 700
    assert any(
        (left != right).any()
        for left, right in zip(firsts, [w.shards for w in order.windows(1)], strict=True)
    )


@pytest.mark.parametrize("n", [10**3, 10**4, 10**5, 10**6, 10**7, 10**8])
def test_rows_over_batches(n: int) -> None:
    """Stored neighbours, divided into 64 groups, are spread over 64 stretches of batches like independent draws."""
    order, n_cells = GlobalShuffle(n, seed=n), 64
    counts = np.zeros((n_cells, n_cells), np.int64)
    seen = np.zeros(n, bool)
    step = 1 << 20
    for start in range(0, n, step):
        places = np.arange(start, min(start + step, n))
        rows = order(0, places)
        seen[rows] = True
        cells = (places * n_cells // n) * n_cells + rows * n_cells // n
        counts += np.bincount(cells, minlength=n_cells**2).reshape(n_cells, n_cells)
    assert seen.all()  # so none comes twice
    expected = n / n_cells**2
    freedom = (n_cells - 1) ** 2
    deviation = ((counts - expected) ** 2 / expected).sum()
    # With few rows per cell the variance is smaller than that of the chi-square distribution.
    assert abs(deviation - freedom) < 5 * np.sqrt(2 * freedom)


def test_rows_of_a_large_store() -> None:
    n = 10**10
    order = GlobalShuffle(n, seed=1)
    places = np.concatenate([np.arange(500_000), np.arange(n - 500_000, n)])
    rows = order(3, places)
    assert rows.min() >= 0
    assert rows.max() < n
    assert len(np.unique(rows)) == len(rows)
    counts = np.bincount(rows * 1_000 // n, minlength=1_000)
    assert abs(((counts - 1_000) ** 2 / 1_000).sum() - 999) < 5 * np.sqrt(2 * 999)
