"""Pairs of stores: aligned batches compared with NumPy, and pairs that are refused."""

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actstore
from actstore.errors import HookError, LoaderError, StorageError
from actstore.facade import Store
from actstore.loader.batches.batch import Batch
from actstore.loader.loader import Loader
from actstore.pairing import paired
from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import Plan
from tests.store.arrays import bits
from tests.store.example import HOOKS, LENGTH, Columns, N, example_plan, example_values, write_store
from tests.store.runs import MLP_OUT, tokens_run, with_hooks, write_run

A, B, HEADS = HOOKS


def write(folder: Path, plan: Plan, values: Columns | None = None) -> Store:
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, values or example_values(plan), range(plan.n_segments))
    return actstore.open(blobs.url)


def other_values(plan: Plan) -> Columns:
    return {name: np.flip(values, 0).copy() for name, values in example_values(plan).items()}


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Store, Store]:
    """Two stores with the same hooks and tokens; the second in bfloat16, with other values and segments."""
    other = example_plan("bfloat16", segment_size=24)
    return (
        write(tmp_path / "one", example_plan()),
        write(tmp_path / "other", other, other_values(other)),
    )


def expected(store: Store, hook: str, places: Any) -> Any:
    return bits(store[hook].rows[:])[places]


def same(given: Any, values: Any) -> None:
    integer = {2: torch.int16, 4: torch.int32}[given.element_size()]
    np.testing.assert_array_equal(bits(given.view(integer).numpy()), values)


@pytest.mark.parametrize("shuffle", ["global", None])
def test_rows_are_aligned(stores: tuple[Store, Store], shuffle: Any) -> None:
    one, other = stores
    seen = []
    with paired([(one, A), (other.url, [A, HEADS])], batch_size=20, shuffle=shuffle, seed=4) as pair:
        assert (pair.n_rows, pair.n_batches) == (N * LENGTH, 15)
        for k, (left, right) in enumerate(pair):
            places = pair.rows(k)
            seen.append(places[0] * LENGTH + places[1])
            same(left, expected(one, A, places))
            assert isinstance(right, dict)
            assert list(right) == [A, HEADS]
            for hook, values in right.items():
                same(values, expected(other, hook, places))
            same(pair.batch(k)[0], expected(one, A, places))
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(N * LENGTH))
    assert [metrics.n_rows for metrics in pair.metrics()] == [N * LENGTH] * 2


def test_window_of_equal_shards(tmp_path: Path) -> None:
    plan = example_plan()
    one, other = write(tmp_path / "one", plan), write(tmp_path / "other", plan, other_values(plan))
    pair = paired([(one, A), (other, B)], batch_size=20, shuffle="window", window_rows=100)
    for k, (left, right) in enumerate(pair):
        same(left, expected(one, A, pair.rows(k)))
        same(right, expected(other, B, pair.rows(k)))


def test_three_stores_masks_and_provenance(stores: tuple[Store, Store]) -> None:
    one, other = stores
    sources: Any = [(one, A), (other, A), (one, B)]
    for batches in paired(sources, batch_size=16, drop=[9], seqpos=slice(1, None), provenance=True):
        assert len(batches) == 3
        first = batches[0]
        assert isinstance(first, Batch)
        assert not (first.tokens == 9).any()
        for batch in batches[1:]:
            assert isinstance(batch, Batch)
            assert torch.equal(batch.tokens, first.tokens)
            assert torch.equal(batch.sequences, first.sequences)


def test_resume(stores: tuple[Store, Store]) -> None:
    sources: Any = [(stores[0], A), (stores[1], A)]
    options: dict[str, Any] = {"batch_size": 30, "epochs": 2, "seed": 9}
    whole = list(paired(sources, **options))
    assert len(whole) == 20
    for n_taken in (0, 7, 10, 20):
        pair = paired(sources, **options)
        assert len(list(itertools.islice(pair, n_taken))) == n_taken
        state = json.loads(json.dumps(pair.state_dict()))
        copy = pickle.loads(pickle.dumps(pair))
        pair.close()
        again = paired(sources, **options)
        again.load_state_dict(state)
        for rest in (again, copy):
            for left, right in itertools.zip_longest(rest, whole[n_taken:]):
                assert all(
                    bits(a.float()).tobytes() == bits(b.float()).tobytes()
                    for a, b in zip(left, right, strict=True)
                )
    with pytest.raises(LoaderError, match="with seed 9, and this one has 0"):
        paired(sources, batch_size=30).load_state_dict(state)


def test_after_an_error_rows_are_still_aligned(stores: tuple[Store, Store], tmp_path: Path) -> None:
    one, other = stores
    path = Path(other.url) / f"acts/{A}/c.1.0.0"
    hidden = path.rename(tmp_path / "hidden")
    pair = paired([(one, A), (other, A)], batch_size=30)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"c\.1\.0\.0 does not exist"):
            next(pair)
    assert pair.state_dict()["batch"] == 0
    hidden.rename(path)
    left, right = next(pair)
    same(left, expected(one, A, pair.rows(0)))
    same(right, expected(other, A, pair.rows(0)))
    assert pair.state_dict()["batch"] == 1


@pytest.mark.parametrize("place", ["__next__", "load_state_dict"])
def test_interrupted_between_two_stores(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    one, other = stores
    pair = paired([(one, A), (other, A)], batch_size=30)
    next(pair), next(pair)
    state = pair.state_dict()

    def interrupted(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pair.loaders[1], "__class__", type("Interrupted", (Loader,), {place: interrupted}))
        with pytest.raises(KeyboardInterrupt):
            next(pair) if place == "__next__" else pair.load_state_dict(state | {"batch": 7})
    assert pair.state_dict() == state
    for k in (2, 3):
        left, right = next(pair)
        same(left, expected(one, A, pair.rows(k)))
        same(right, expected(other, A, pair.rows(k)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_sequences": 36, "n_tokens": 36 * LENGTH},
            r"they have shapes \(37, 8\) and \(36, 8\), of sequences",
        ),
        (
            {"tokens_sha256": "f" * 64},
            "they have tokens_sha256 .* and ffffffffffff over 37 and 37 sequences;",
        ),
    ],
)
def test_other_tokens(stores: tuple[Store, Store], tmp_path: Path, changes: Any, message: str) -> None:
    different = write(tmp_path / "different", example_plan(**changes))
    with pytest.raises(LoaderError, match=f"are not over the same tokens: {message}"):
        paired([(stores[0], A), (different, A)], batch_size=8)


def test_tokens_of_several_runs(tmp_path: Path) -> None:
    stores = []
    for name, runs in (("one", ["0001"]), ("other", ["0002"]), ("more", ["0001", "0002"])):
        blobs = LocalBlobs(tmp_path / name)
        write_run(blobs, example_plan())
        for run in runs:
            size = 16 // len(runs)
            write_run(blobs, tokens_run(run, n_sequences=size, n_tokens=size * LENGTH))
        stores.append(actstore.open(blobs.url))
    # The name of a run says nothing about its tokens.
    assert paired([(stores[0], A), (stores[1], A)], batch_size=8).n_rows == (N + 16) * LENGTH
    with pytest.raises(LoaderError, match="they have their tokens from 2 and 3 runs"):
        paired([(stores[0], A), (stores[2], A)], batch_size=8)


def test_refused(stores: tuple[Store, Store], tmp_path: Path) -> None:
    one, other = stores
    with pytest.raises(
        LoaderError, match="do not have one order of rows: they differ in shards; shuffle='global'"
    ):
        paired([(one, A), (other, A)], batch_size=8, shuffle="window")
    with pytest.raises(LoaderError, match="a pair needs two stores or more, and 1 were given"):
        paired([(one, A)], batch_size=8)
    with pytest.raises(LoaderError, match="max_norm would drop other rows in each store"):
        paired([(one, A), (other, A)], batch_size=8, max_norm=1.0)
    names: Any
    for names in ("nonfinite", ["nonfinite"], {"nonfinite"}, (name for name in ("pad", "nonfinite"))):
        with pytest.raises(LoaderError, match="drop='nonfinite' would drop other rows in each store"):
            paired([(one, A), (other, A)], batch_size=8, drop=names)
    with pytest.raises(HookError, match="does not hold"):
        paired([(one, A), (other, MLP_OUT)], batch_size=8)
    alone = write(tmp_path / "alone", with_hooks(example_plan(), MLP_OUT))
    assert len(next(paired([(one, A), (alone, MLP_OUT)], batch_size=8))) == 2
