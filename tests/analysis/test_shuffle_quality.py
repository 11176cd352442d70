"""The composition of batches compared with counting, and independent draws compared with all possible draws."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.analysis.shuffle_quality import batch_entropy, shuffle_quality
from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import HookArray
from tests.store.example import HOOKS, LENGTH, N, example_plan, example_values, write_store

A = HOOKS[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    blobs, plan = LocalBlobs(tmp_path_factory.mktemp("store")), example_plan()
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    return actstore.open(blobs.url)


@pytest.fixture(scope="module")
def unread(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """4,096 sequences of 64 tokens in 64 shards, none of which exist: nothing may read them."""
    plan = example_plan()
    tokens = plan.request.tokens.model_copy(update={"context_length": 64})
    hooks = (HookArray(name=A, shape=(1,), axes=("d_model",)),)
    request = plan.request.model_copy(update={"tokens": tokens, "hooks": hooks})
    sizes = {"n_sequences": 4096, "n_tokens": 4096 * 64, "segment_size": 64}
    whole = plan.model_copy(update={"request": request, **sizes})
    blobs = LocalBlobs(tmp_path_factory.mktemp("store"))
    write_store(blobs, whole, example_values(whole), range(whole.n_segments))
    for path in Path(blobs.url).glob("*/*/c.*"):
        path.unlink()
    return actstore.open(blobs.url)


@pytest.mark.parametrize("shuffle", ["global", "window", None])
@pytest.mark.parametrize("epoch", [0, 1])
def test_counts(store: Store, shuffle: Any, epoch: int) -> None:
    loader = store.loader(A, batch_size=30, shuffle=shuffle, window_rows=100)
    quality = shuffle_quality(loader, epoch=epoch)
    counters = [Counter(loader.rows(k, epoch)[0].tolist()) for k in range(9)]  # the tenth is smaller
    assert (quality.n_rows, quality.n_sequences, quality.batch_rows, quality.n_batches) == (
        N * LENGTH,
        N,
        30,
        9,
    )
    assert quality.order.sequences == pytest.approx(np.mean([len(one) for one in counters]))
    assert quality.order.rows_per_sequence == pytest.approx(270 / sum(len(one) for one in counters))
    assert quality.order.most_rows == pytest.approx(np.mean([max(one.values()) for one in counters]))
    parts = [[n / 30 for n in one.values()] for one in counters]
    entropies = [-sum(p * math.log(p) for p in one) / math.log(N) for one in parts]
    assert quality.order.entropy == pytest.approx(np.mean(entropies))


def test_bounds_of_entropy() -> None:
    assert batch_entropy(np.array([7]), 10) == 0
    assert batch_entropy(np.array([5] * 10), 10) == pytest.approx(1)
    assert batch_entropy(np.array([1] * 4), 10) == pytest.approx(math.log(4) / math.log(10))
    assert batch_entropy(np.array([3]), 1) == 0


@pytest.mark.parametrize(("seqpos", "mask"), [([0, 1], None), (None, [2, 3, 3])])
def test_independent_draws_are_exact(store: Store, seqpos: Any, mask: Any) -> None:
    """All batches of 4 rows out of 3 sequences are equally likely, with equally many rows per sequence or not."""
    keep = np.zeros((N, LENGTH), bool)
    for sequence, n_rows in enumerate(mask or [LENGTH] * 3):
        keep[sequence, :n_rows] = True
    loader = store.loader(A, batch_size=4, seqpos=seqpos, mask=keep)
    quality = shuffle_quality(loader)
    owners = [sequence for sequence, n_rows in enumerate(mask or [2] * 3) for _ in range(n_rows)]
    batches = [np.unique(batch, return_counts=True)[1] for batch in itertools.product(owners, repeat=4)]
    assert quality.n_sequences == 3
    assert quality.independent.sequences == pytest.approx(np.mean([len(counts) for counts in batches]))
    entropies = [batch_entropy(counts, 3) for counts in batches]
    assert quality.independent.entropy == pytest.approx(np.mean(entropies), rel=1e-12)
    assert 2 <= quality.independent.most_rows <= 4


@pytest.mark.parametrize(("batch_size", "n_draws"), [(64, 2000), (4096, 400), (100_000, 20)])
def test_independent_draws_against_simulation(unread: Store, batch_size: int, n_draws: int) -> None:
    quality = shuffle_quality(unread.loader(A, batch_size=batch_size))
    random = np.random.default_rng(7)
    draws = [np.unique(random.integers(4096, size=batch_size), return_counts=True)[1] for _ in range(n_draws)]
    entropies = [batch_entropy(counts, 4096) for counts in draws]
    error = np.std(entropies) / math.sqrt(n_draws)
    assert abs(quality.independent.entropy - np.mean(entropies)) < 4 * error
    assert quality.independent.rows_per_sequence == pytest.approx(
        batch_size * n_draws / sum(len(counts) for counts in draws), rel=0.01
    )


def test_what_it_is_for(unread: Store) -> None:
    """A window of all rows is as good as a global shuffle; one of a 64th, and no shuffle, are not."""
    options: dict[str, Any] = {"batch_size": 1024, "seed": 3}
    everywhere = shuffle_quality(unread.loader(A, **options))
    for wide in (everywhere, shuffle_quality(unread.loader(A, shuffle="window", **options))):
        assert wide.order.entropy == pytest.approx(wide.independent.entropy, rel=1e-3)
        assert wide.order.rows_per_sequence == pytest.approx(wide.independent.rows_per_sequence, rel=0.01)
        assert wide.order.most_rows == pytest.approx(wide.independent.most_rows, rel=0.1)
    narrow = shuffle_quality(unread.loader(A, shuffle="window", window_rows=4096, **options))
    assert narrow.order.rows_per_sequence > 8 * narrow.independent.rows_per_sequence
    assert narrow.order.entropy < 0.65 * narrow.independent.entropy
    in_order = shuffle_quality(unread.loader(A, shuffle=None, **options))
    assert in_order.order.rows_per_sequence == in_order.order.most_rows == 64
    assert in_order.order.entropy == pytest.approx(math.log(16) / math.log(4096))


def test_one_sequence(store: Store) -> None:
    keep = np.arange(N) == 5
    quality = shuffle_quality(store.loader(A, batch_size=4, mask=keep))
    assert (quality.n_sequences, quality.order.entropy, quality.independent.entropy) == (1, 0, 0)
    assert quality.order.rows_per_sequence == quality.independent.rows_per_sequence == 4


def test_smaller_than_a_batch_and_ranks(store: Store) -> None:
    assert shuffle_quality(store.loader(A, batch_size=1000)).batch_rows == N * LENGTH
    assert shuffle_quality(store.loader(A, batch_size=30, rank=1, world_size=2)).batch_rows == 15


def test_rows_are_not_looked_for_again(tmp_path: Path) -> None:
    """The loader knows which rows are kept; finding them took reading all activations."""
    blobs, plan = LocalBlobs(tmp_path), example_plan()
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    loader = actstore.open(blobs.url).loader(A, batch_size=8, max_norm=1e38)
    for path in tmp_path.glob("*/*/c.*"):
        path.unlink()
    assert shuffle_quality(loader).n_rows == loader.n_rows


def test_no_batches(store: Store) -> None:
    with pytest.raises(LoaderError, match="n_batches is 0; it must be 1 or more"):
        shuffle_quality(store.loader(A, batch_size=8), 0)
