"""Loaders of a store on S3 whose requests fail now and then give the same batches as from local disk."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import actstore
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.records.seal import seal
from tests.faults.fault_plan import Fault, Plan, Request, at_random
from tests.faults.proxy import FaultProxy
from tests.store.example import HOOKS, example_plan, example_values, write_store
from tests.store.runs import bytes_below

N_SEQUENCES = 500


@pytest.fixture
def stores(
    tmp_path: Path,
    s3_url: str,
    s3_environment: dict[str, str],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[actstore.Store, actstore.Store]]:
    """The same store on local disk and on S3, the latter read through the proxy."""
    plan = example_plan("bfloat16", n_sequences=N_SEQUENCES, n_tokens=8 * N_SEQUENCES)
    local = LocalBlobs(tmp_path / "store")
    write_store(local, plan, example_values(plan), range(plan.n_segments))
    seal(local)
    monkeypatch.setenv("ACTSTORE_S3", s3_environment["ACTSTORE_S3"])
    there = open_blobs(s3_url)
    for key, data in bytes_below(local).items():
        assert there.create(key, [data])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield actstore.open(local.url), actstore.open(s3_url)
    shutil.rmtree(local.url)


def all_batches(store: actstore.Store, **options: Any) -> tuple[list[torch.Tensor], int]:
    with store.loader(
        HOOKS[0], batch_size=64, shuffle="window", window_rows=600, seed=4, **options
    ) as loader:
        return [batch.view(torch.int16).clone() for batch in loader], loader.metrics().n_retries


@pytest.mark.parametrize("fault", ["refuse", "cut body"])
def test_same_batches_over_a_bad_network(
    stores: tuple[actstore.Store, actstore.Store], proxy: FaultProxy, fault: Fault
) -> None:
    local, remote = stores
    proxy.plan = at_random(0.05, fault, seed=3, methods="GET HEAD")
    expected, _ = all_batches(local, epochs=2)
    batches, n_retries = all_batches(remote, epochs=2)
    assert len(batches) == len(expected) == 2 * 63
    for left, right in zip(batches, expected, strict=True):
        assert torch.equal(left, right)
    assert n_retries >= proxy.faults[fault] > 0


def cut_each_shard_once(request: Request) -> Fault | None:
    return "cut body" if "acts/" in request.key and request.turn == 0 else None


def test_every_connection_is_cut_once(
    stores: tuple[actstore.Store, actstore.Store], proxy: FaultProxy
) -> None:
    local, remote = stores
    plan: Plan = cut_each_shard_once
    proxy.plan = plan
    expected, _ = all_batches(local)
    batches, n_retries = all_batches(remote)
    for left, right in zip(batches, expected, strict=True):
        assert torch.equal(left, right)
    n_shards = remote.runs[0].plan.n_segments
    assert n_retries >= proxy.faults["cut body"] == n_shards


def test_resume(stores: tuple[actstore.Store, actstore.Store]) -> None:
    local, remote = stores
    expected, _ = all_batches(local)
    options: dict[str, Any] = {"batch_size": 64, "shuffle": "window", "window_rows": 600, "seed": 4}
    with remote.loader(HOOKS[0], **options) as loader:
        taken = [next(loader).view(torch.int16).clone() for _ in range(25)]
        state = loader.state_dict()
    with local.loader(HOOKS[0], **options) as loader:
        loader.load_state_dict(state)
        taken += [batch.view(torch.int16).clone() for batch in loader]
    for left, right in zip(taken, expected, strict=True):
        assert torch.equal(left, right)
