"""Dropped rows, compared with NumPy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import actstore
from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.loader.dropping import drop
from actstore.loader.dropping.norm_limit import BLOCK_NBYTES
from actstore.storage.local import LocalBlobs
from tests.loader.stores import N_ROWS, A, rows_of
from tests.store import example
from tests.store.example import LENGTH, N, example_plan, example_tokens, example_values, write_store


def kept(store: Store, **options: Any) -> NDArray[np.bool_]:
    is_kept = np.zeros(N_ROWS, bool)
    is_kept[rows_of(store.loader(A, batch_size=8, **options))] = True
    return is_kept.reshape(N, LENGTH)


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
@pytest.mark.parametrize("nbytes", [BLOCK_NBYTES, 5 * 4 * LENGTH], ids=["at once", "in blocks"])
def test_dropped_rows(
    store: Store, options: dict[str, Any], oracle: Oracle, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drop, "BLOCK_NBYTES", nbytes)
    ids = store.tokens[:]
    positions = np.broadcast_to(np.arange(LENGTH), ids.shape)
    np.testing.assert_array_equal(kept(store, **options), oracle(ids, positions))
    np.testing.assert_array_equal(kept(store, shuffle="window", **options), oracle(ids, positions))


@pytest.fixture
def padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store whose first token is not finite, with padding in the first and in the last segment."""
    plan = example_plan()
    tokens = {**example_tokens(plan), "lengths": np.full(N, 5, "<i4")}
    monkeypatch.setattr(example, "example_tokens", lambda _: tokens)
    values = {name: np.ones_like(array) for name, array in example_values(plan).items()}
    values[A][0, 0] = np.nan
    values[A][[0, 1, N - 1], 6] = np.nan
    blobs = LocalBlobs(tmp_path / "padded")
    write_store(blobs, plan, values, range(plan.n_segments))
    return actstore.open(blobs.url)


@pytest.mark.parametrize("nbytes", [BLOCK_NBYTES, 5000], ids=["at once", "in blocks"])
def test_padding_is_dropped_alike_in_all_segments(
    padded: Store, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding is dropped whether its values are finite or not, and whether its segment has tokens that are not."""
    monkeypatch.setattr(drop, "BLOCK_NBYTES", nbytes)
    finite = np.ones((N, LENGTH), bool)
    finite[0, 0] = False
    np.testing.assert_array_equal(kept(padded, drop=["nonfinite"]), finite)
    finite[:, 5:] = False
    np.testing.assert_array_equal(kept(padded, drop=["nonfinite", "pad"]), finite)


@pytest.mark.parametrize("kind", [list, set, iter, dict.fromkeys, lambda names: (name for name in names)])
def test_names_to_be_dropped_come_in_anything_that_can_be_iterated_over(padded: Store, kind: Any) -> None:
    names = ["pad", "nonfinite", 7]
    np.testing.assert_array_equal(kept(padded, drop=kind(names)), kept(padded, drop=names))
    assert kept(padded, drop=kind(names)).sum() == N * 5 - 1  # 7 is the id of padding


@pytest.mark.parametrize("drop", [None, 1.5, [["pad"]], [None], True, ["unknown"]])
def test_what_cannot_be_dropped_is_named(store: Store, drop: Any) -> None:
    with pytest.raises(LoaderError, match=r"drop is|drop names"):
        store.loader(A, batch_size=8, drop=drop)


def test_large_norms_are_dropped(store: Store) -> None:
    values = store[A][:]
    norms = values.double().square().sum(-1).sqrt()
    limit = float(norms[norms.isfinite()].median())
    is_kept = kept(store, max_norm=limit)
    np.testing.assert_array_equal(is_kept, (norms <= limit).numpy())
    assert 0 < is_kept.sum() < N_ROWS


def test_norms_do_not_depend_on_the_order_of_a_sum(tmp_path: Path) -> None:
    """Whether float32 loses the small values beside the large one depends on the order in which a machine adds them."""
    plan = example_plan()
    values = {name: array.copy() for name, array in example_values(plan).items()}
    values[A][:] = 0.1
    values[A][..., 0] = 4096
    blobs = LocalBlobs(tmp_path / "values")
    write_store(blobs, plan, values, range(plan.n_segments))
    store = actstore.open(blobs.url)
    with pytest.raises(LoaderError, match="all 296 rows of .* are dropped"):
        store.loader(A, batch_size=8, max_norm=4096.0)
    assert store.loader(A, batch_size=8, max_norm=4096.001).n_rows == N_ROWS
