"""The dataset in DataLoaders, forked, spawned and without workers, compared with the plain loader."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import actstore
from actstore.errors import HookError, LoaderError
from actstore.facade import Store
from actstore.integrations.torch_dataset import ActivationDataset
from actstore.loader.batches import batch_maker
from actstore.loader.batches.batch import Batch
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from tests.commands import start_server
from tests.store.example import HOOKS, example_plan, example_values, write_store

# torch warns of too many workers depending on the machine.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
A, B, _ = HOOKS


def write(blobs: Blobs, compression: Any = None) -> Store:
    plan = example_plan("bfloat16", compression)
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    return actstore.open(blobs.url)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write(LocalBlobs(tmp_path / "store"))


def batches(dataset: ActivationDataset, **options: Any) -> list[Any]:
    return list(DataLoader(dataset, batch_size=None, **options))


def check(given: list[Any], expected: list[Any]) -> None:
    assert len(given) == len(expected)
    for left, right in zip(given, expected, strict=True):
        assert torch.equal(left.view(torch.int16), right.view(torch.int16))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_order_of_the_loader(store: Store, method: str) -> None:
    options: dict[str, Any] = {"batch_size": 30, "seed": 5, "epochs": 3}
    dataset = ActivationDataset(store, A, **options)
    given = batches(dataset, num_workers=2, multiprocessing_context=method)
    check(given, list(store.loader(A, **options)))
    assert len(given) == 30


def test_rows_that_are_left_are_found_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ActivationDataset(store, A, batch_size=30, max_norm=1e30)
    copies = [dataset, pickle.loads(pickle.dumps(dataset))]
    loader = pickle.dumps(store.loader(A, batch_size=30, max_norm=1e30))

    def look(*_args: Any) -> None:
        raise AssertionError("all activations would be read again")

    monkeypatch.setattr(batch_maker, "valid_rows", look)
    for copy in copies:
        assert len(list(copy)) == len(list(copy)) == dataset.n_batches
    assert len(list(pickle.loads(loader))) == dataset.n_batches


@pytest.mark.parametrize("n_workers", [0, 1, 3])
@pytest.mark.parametrize("shuffle", ["global", "window", None])
def test_any_number_of_workers(store: Store, n_workers: int, shuffle: Any) -> None:
    options: dict[str, Any] = {"batch_size": 40, "seed": 6, "shuffle": shuffle, "window_rows": 100}
    dataset = ActivationDataset(store.url, A, **options)
    assert dataset.n_batches == 8
    method = "fork" if n_workers else None
    given = batches(dataset, num_workers=n_workers, multiprocessing_context=method)
    check(given, list(store.loader(A, **options)))


def test_fork_after_the_parent_has_read(tmp_path: Path) -> None:
    store = write(LocalBlobs(tmp_path / "store"), "zstd")
    options: dict[str, Any] = {"batch_size": 40, "shuffle": "window", "window_rows": 100}
    dataset = ActivationDataset(store, A, **options)
    here = list(dataset)
    check(batches(dataset, num_workers=2, multiprocessing_context="fork"), here)


def test_hooks_provenance_and_ranks(store: Store) -> None:
    options: dict[str, Any] = {"batch_size": 30, "provenance": True, "rank": 1, "world_size": 2}
    dataset = ActivationDataset(store, [A, B], **options)
    given = batches(dataset, num_workers=2, multiprocessing_context="fork")
    for left, right in zip(given, store.loader([A, B], **options), strict=True):
        assert isinstance(left, Batch)
        assert isinstance(right, Batch)
        assert torch.equal(left.sequences, right.sequences)
        assert isinstance(left.values, dict)
        assert isinstance(right.values, dict)
        for hook in (A, B):
            assert torch.equal(left.values[hook].view(torch.int16), right.values[hook].view(torch.int16))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_start_in_the_middle(store: Store, n_workers: int) -> None:
    options: dict[str, Any] = {"batch_size": 30, "epochs": 2}
    whole = [batch.clone() for batch in store.loader(A, **options)]
    dataset = ActivationDataset(store, A, **options)
    method = "fork" if n_workers else None
    for epoch, batch in ((0, 7), (1, 0), (1, 9), (0, 0)):
        dataset.start_at(epoch, batch)
        given = batches(dataset, num_workers=n_workers, multiprocessing_context=method)
        check(given, whole[epoch * 10 + batch :])
    for epoch, batch in ((2, 0), (0, 10), (-1, 0)):
        with pytest.raises(LoaderError, match=f"there is no batch {batch} of epoch {epoch}; there are 10"):
            dataset.start_at(epoch, batch)


def test_without_end(store: Store) -> None:
    options: dict[str, Any] = {"batch_size": 100, "epochs": None}
    dataset = ActivationDataset(store, A, **options)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    given = list(itertools.islice(loader, 8))
    check(given, list(itertools.islice(store.loader(A, **options), 8)))


def test_other_storage() -> None:
    dataset = ActivationDataset(write(open_blobs("memory://dataset")), A, batch_size=30, shuffle="window")
    assert len(batches(dataset)) == 10
    assert len(list(pickle.loads(pickle.dumps(dataset)))) == 10
    message = "is not on a local disk, and its connections do not survive a fork; .* multiprocessing_context='spawn'"
    with pytest.raises(LoaderError, match=message):
        batches(dataset, num_workers=1, multiprocessing_context="fork")


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_s3(s3_url: str, method: str) -> None:
    """A process of the server of forks gets the dataset pickled, as a spawned one does."""
    store = write(open_blobs(s3_url))
    dataset = ActivationDataset(s3_url, A, batch_size=30, shuffle="window", window_rows=100)
    expected = list(store.loader(A, batch_size=30, shuffle="window", window_rows=100))
    if method == "fork":
        with pytest.raises(LoaderError, match="connections do not survive a fork"):
            batches(dataset, num_workers=1, multiprocessing_context=method)
    else:
        start_server()
        check(batches(dataset, num_workers=2, multiprocessing_context=method), expected)


def test_refused_where_it_is_made(store: Store) -> None:
    with pytest.raises(LoaderError, match="batch_size is 0"):
        ActivationDataset(store, A, batch_size=0)
    with pytest.raises(HookError, match="does not hold"):
        ActivationDataset(store, "blocks.7.hook_mlp_out", batch_size=8)
