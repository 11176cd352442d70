"""Data for dictionary_learning, compared with NumPy and used in a loop like its `trainSAE`."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actstore
from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.integrations.dictionary_learning import TrainingData, activations, paired_activations
from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import HookArray, Plan
from tests.store.example import D_MODEL, HOOKS, LENGTH, N, example_plan, write_store

A, B, HEADS = HOOKS
N_ROWS = N * LENGTH


def write(folder: Path, plan: Plan, seed: int = 0) -> Store:
    random = np.random.default_rng(seed)
    arrays = {hook.name: plan.activations(hook) for hook in plan.request.hooks}
    values = {name: random.normal(size=layout.shape).astype("<f4") for name, layout in arrays.items()}
    if plan.request.dtype == "bfloat16":
        values = {name: (array.view("<u4") >> 16).astype("<u2") for name, array in values.items()}
    blobs = LocalBlobs(folder)
    write_store(blobs, plan, values, range(plan.n_segments))
    return actstore.open(blobs.url)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write(tmp_path / "store", example_plan())


def values(store: Store, hook: str, places: Any) -> torch.Tensor:
    return store[hook][:].flatten(2)[places].float()


def test_one_hook_without_end(store: Store) -> None:
    with activations(store.url, A, batch_size=50, seed=1) as data:
        given = list(itertools.islice(data, 14))
    loader = store.loader(A, batch_size=50, seed=1, drop_last=True)
    assert loader.n_batches == 5
    for i, batch in enumerate(given):
        assert batch.shape == (50, D_MODEL)
        assert torch.equal(batch, values(store, A, loader.rows(i % 5, i // 5)))
    assert not torch.equal(given[0], given[5])


def test_several_hooks_are_stacked(store: Store) -> None:
    data = activations(store, [B, A, HEADS], batch_size=50)
    loader = store.loader(A, batch_size=50, drop_last=True)
    batch = next(data)
    assert batch.shape == (50, 3, D_MODEL)
    for i, hook in enumerate((B, A, HEADS)):
        assert torch.equal(batch[:, i], values(store, hook, loader.rows(0)))


def test_heads_are_flattened(store: Store) -> None:
    assert next(activations(store, HEADS, batch_size=50)).shape == (50, D_MODEL)


def test_stores_are_stacked(store: Store, tmp_path: Path) -> None:
    other = write(tmp_path / "other", example_plan("bfloat16"), seed=1)
    data = paired_activations([(store, A), (other, [B, A])], batch_size=50)
    batch = next(data)
    assert (batch.shape, batch.dtype) == ((50, 3, D_MODEL), torch.float32)
    places = data.loader.rows(0)
    for i, (one, hook) in enumerate([(store, A), (other, B), (other, A)]):
        assert torch.equal(batch[:, i], values(one, hook, places))


def test_type(store: Store, tmp_path: Path) -> None:
    other = write(tmp_path / "other", example_plan("bfloat16"))
    assert next(activations(other, A, batch_size=8)).dtype == torch.float32
    assert next(activations(other, A, batch_size=8, dtype=None)).dtype == torch.bfloat16
    assert next(activations(store, A, batch_size=8, dtype="float16")).dtype == torch.float16


def test_resume(store: Store) -> None:
    options: dict[str, Any] = {"batch_size": 50, "seed": 2}
    whole = list(itertools.islice(activations(store, [A, B], **options), 12))
    data = activations(store, [A, B], **options)
    list(itertools.islice(data, 7))
    again = activations(store, [A, B], **options)
    again.load_state_dict(json.loads(json.dumps(data.state_dict())))
    for left, right in zip(itertools.islice(again, 5), whole[7:], strict=True):
        assert torch.equal(left, right)


def train(data: TrainingData, steps: int, norm_steps: int = 10) -> float:
    """Use data as `trainSAE` does with ``normalize_activations=True``: iterate twice, and change batches in place."""
    squares = []
    for step, batch in enumerate(data):
        if step > norm_steps:
            break
        squares.append(torch.mean(torch.sum(batch**2, dim=1)))
    norm = torch.sqrt(torch.stack(squares).mean())
    weights = torch.zeros(D_MODEL, D_MODEL, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.1)
    loss = torch.tensor(0.0)
    for step, batch in enumerate(data):
        batch = batch.to(dtype=torch.float32)
        batch /= norm
        if step >= steps:
            break
        loss = (batch @ weights - batch).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(loss.detach())


def test_a_trainer(store: Store) -> None:
    before = bytes(store[A][:].numpy().tobytes())
    with activations(store, A, batch_size=50) as data:
        assert train(data, 200) < 0.1
        json.dumps(data.config)
        assert data.config["stores"] == [store.url]
    assert store[A][:].numpy().tobytes() == before


def test_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="epochs cannot be set here: .* leave it out"):
        activations(store, A, batch_size=8, epochs=1)
    with pytest.raises(LoaderError, match="fewer than one batch of 300"):
        activations(store, A, batch_size=300)
    wide = HookArray(name=B, shape=(2 * D_MODEL,), axes=("d_model",))
    plan = example_plan()
    request = plan.request.model_copy(update={"hooks": (plan.request.hooks[0], wide)})
    other = write(tmp_path / "other", plan.model_copy(update={"request": request}))
    with pytest.raises(LoaderError, match=f"{A} of .* has 16, {B} of .* has 32; choose others"):
        activations(other, [A, B], batch_size=8)
    assert activations(other, A, batch_size=8).loader.n_rows == N_ROWS
