"""Saving the state of a loader, and continuing in another process or with another number of ranks."""

import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actstore
from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from actstore.store.records.seal import seal
from tests.loader.stores import A, B, finished, rows_of
from tests.store.example import LENGTH, N, example_plan, example_values, write_store
from tests.store.runs import MLP_OUT, hooks_run, tokens_run, write_run


def test_epochs(store: Store) -> None:
    loader = store.loader(A, batch_size=100, epochs=None, seed=3)
    given = [next(loader) for _ in range(7)]
    assert [len(batch) for batch in given] == [100, 100, 96, 100, 100, 96, 100]
    assert loader.epoch == 2
    again = store.loader(A, batch_size=100, epochs=2)
    assert [again.epoch, *(again.epoch for _ in again)] == [0, 0, 0, 1, 1, 1, 2]
    assert (rows_of(loader, 0) != rows_of(loader, 1)).any()
    dropped = store.loader(A, batch_size=100, epochs=3, drop_last=True)
    assert [len(batch) for batch in dropped] == [100] * 6


@pytest.mark.parametrize("prefetch", [0, 2])
def test_place_behind_a_last_batch(store: Store, prefetch: int) -> None:
    options: dict[str, Any] = {"batch_size": 100, "epochs": 2, "prefetch": prefetch}
    loader = store.loader(A, **options)
    places = [(state["epoch"], state["batch"]) for state in (loader.state_dict() for _ in loader)]
    assert places == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    at_the_end = loader.state_dict()
    # A place behind the last batch, given as one of the same epoch, is the first of the next.
    for state in (at_the_end, at_the_end | {"epoch": 1, "batch": 3}):
        again = store.loader(A, **options)
        again.load_state_dict(state)
        assert (again.epoch, again.state_dict()) == (2, at_the_end)
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(again)
    again.load_state_dict(at_the_end | {"epoch": 0, "batch": 3})
    assert (again.epoch, again.state_dict()["batch"]) == (1, 0)
    assert torch.equal(
        next(again).view(torch.int32), store.loader(A, **options).batch(0, 1).view(torch.int32)
    )


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
        ({"seqpos": [0]}, "that drops other rows: 37 of them were left, and 296 are here"),
        ({"drop_last": True}, "with drop_last True, and this one has False"),
    ],
)
def test_state_of_another_order(store: Store, changes: dict[str, Any], message: str) -> None:
    other = store.loader(A, **({"batch_size": 30} | changes))
    with pytest.raises(LoaderError, match=message):
        store.loader(A, batch_size=30).load_state_dict(other.state_dict())


def test_state_of_other_windows(store: Store, tmp_path: Path) -> None:
    """The other windows are larger, or of a store with the same rows in other shards."""
    options: dict[str, Any] = {"batch_size": 30, "shuffle": "window"}
    loader = store.loader(A, window_rows=16 * LENGTH, **options)
    state = store.loader(A, window_rows=32 * LENGTH, **options).state_dict()
    with pytest.raises(LoaderError, match="with window_rows 256, and this one has 128"):
        loader.load_state_dict(state)
    other, _ = finished(LocalBlobs(tmp_path / "other"), example_plan(segment_size=8))
    state = other.loader(A, window_rows=16 * LENGTH, **options).state_dict()
    with pytest.raises(LoaderError, match=r"with shards \d+, and this one has \d+"):
        loader.load_state_dict(state)


def test_state_of_as_many_other_rows(store: Store) -> None:
    masks = [np.ones(N, bool) for _ in range(2)]
    masks[0][0] = masks[1][1] = False
    loaders = [store.loader(A, batch_size=8, mask=mask) for mask in masks]
    with pytest.raises(LoaderError, match="that drops other rows: 288 of them were left, and 288 are here"):
        loaders[0].load_state_dict(loaders[1].state_dict())


def test_integers_of_numpy(store: Store) -> None:
    options: dict[str, Any] = {"batch_size": np.int32(30), "seed": np.int64(3), "drop": [np.int64(5)]}
    loader = store.loader(A, **options)
    plain = store.loader(A, batch_size=30, seed=3, drop=[5])
    assert json.loads(json.dumps(loader.state_dict())) == plain.state_dict()


def test_seek(store: Store) -> None:
    loader = store.loader(A, batch_size=30, epochs=2)
    for epoch, k in ((1, 3), (0, 9), (0, 0)):
        loader.seek(epoch, k)
        assert loader.place == (epoch, k)
        assert torch.equal(next(loader).view(torch.int32), loader.batch(k, epoch).view(torch.int32))
    for epoch, k in ((0, 11), (-1, 0), (2, 1), (3, 0)):
        with pytest.raises(LoaderError, match=f"there is no batch {k} of epoch {epoch}; there are 10"):
            loader.seek(epoch, k)
    loader.seek(2)
    assert list(loader) == []


def test_tokens_that_are_added_later_are_not_of_this_order(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    write_run(blobs, example_plan())
    store = actstore.open(blobs.url)
    loader = store.loader(A, batch_size=30, drop=[5])
    state, copy = loader.state_dict(), pickle.dumps(loader)
    write_run(blobs, tokens_run("0001"))
    store.refresh()
    assert store.shape[0] > N
    assert loader.state_dict() == state
    with pytest.raises(LoaderError, match=f"the state is of other tokens than those of {blobs.url}"):
        pickle.loads(copy)


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
        {"version": 1, "epoch": 0.5, "batch": 0, "order": {}},
        {"version": 2, "epoch": 0, "batch": 0, "order": {}},
    ],
)
def test_no_state(store: Store, state: Any) -> None:
    with pytest.raises(LoaderError):
        store.loader(A, batch_size=30).load_state_dict(state)


def renamed(store: Store, tmp_path: Path, **changes: Any) -> Store:
    """A store with another plan, or with other values under the same plan."""
    plan = example_plan()
    model = plan.request.model.model_copy(update=changes)
    plan = plan.model_copy(update={"request": plan.request.model_copy(update={"model": model})})
    values = {name: value[::-1].copy() for name, value in example_values(plan).items()}
    blobs = LocalBlobs(tmp_path / "other")
    write_store(blobs, plan, values, range(plan.n_segments))
    seal(blobs)
    return actstore.open(blobs.url)


@pytest.mark.parametrize("changes", [{}, {"fingerprint": "crc32c:1"}], ids=["values", "model"])
def test_state_of_another_store(store: Store, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The stores have the same tokens in the same order, so the order does not tell them apart."""
    other = renamed(store, tmp_path, **changes)
    ours, theirs = (opened.loader(A, batch_size=30) for opened in (store, other))
    assert ours.state_dict()["order"] == theirs.state_dict()["order"]
    with pytest.raises(LoaderError, match="the state is of a loader of another store"):
        ours.load_state_dict(theirs.state_dict())
    copy = tmp_path / "copy"
    shutil.copytree(store.url, copy)
    actstore.open(copy).loader(A, batch_size=30).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("hooks", [B, [A, B], "blocks.*.hook_resid_post"])
def test_state_of_other_hooks(store: Store, hooks: Any) -> None:
    ours, theirs = store.loader(A, batch_size=30), store.loader(hooks, batch_size=30)
    with pytest.raises(LoaderError, match=f"is of a loader of .*, and this one is of {A};"):
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(LoaderError, match=f"the state is of a loader of {A}, and this one is of"):
        theirs.load_state_dict(ours.state_dict())


def test_states_of_earlier_releases_are_taken(store: Store) -> None:
    state = store.loader(B, batch_size=30).state_dict()
    del state["loaders"]
    loader = store.loader(A, batch_size=30)
    loader.load_state_dict(state | {"batch": 3})
    assert loader.place == (0, 3)
    with pytest.raises(LoaderError, match="is not part of a state"):
        loader.load_state_dict(state | {"loaders": [1]})


def test_a_state_outlives_the_end_of_a_run_and_further_hooks(tmp_path: Path) -> None:
    """When all segments are committed, the manifest and hooks that are added come later."""
    blobs = LocalBlobs(tmp_path / "store")
    write_run(blobs, example_plan())
    state = actstore.open(blobs.url).loader(A, batch_size=30).state_dict()
    seal(blobs)
    finished = actstore.open(blobs.url).loader(A, batch_size=30)
    finished.load_state_dict(state)
    write_run(blobs, hooks_run("0001", MLP_OUT))
    for saved in (state, finished.state_dict()):
        actstore.open(blobs.url).loader(A, batch_size=30).load_state_dict(saved)
