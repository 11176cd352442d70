"""Reading activations as a Ray Dataset, on a real Ray, compared with NumPy."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import actstore
from actstore.errors import HookError, JobError, NotCommittedError
from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from tests.docs.test_training_pages import DOCS, RAY, run_page
from tests.store.example import HOOKS, LENGTH, SEGMENT, N, example_plan, write_store
from tests.store.runs import MLP_OUT, hooks_run, tokens_run, write_run
from tests.store.slots import ragged, ragged_plan, write_ragged

pytestmark = [
    pytest.mark.ray,
    # Ray itself sets options that it deprecates, to their defaults.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]
A, _, HEADS = HOOKS


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """One cluster for this file."""
    from actstore_workers.cluster import cluster

    with cluster(None, num_cpus=2) as connected:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        yield connected


def numbers(dtype: str, plan: Any) -> dict[str, NDArray[Any]]:
    """Values that every type can represent."""
    values_by_hook = {}
    for seed, hook in enumerate(plan.request.hooks):
        shape = plan.activations(hook).shape
        values = np.random.default_rng(seed).integers(-100, 100, shape).astype("<f4")
        if dtype == "bfloat16":
            values_by_hook[hook.name] = (values.view("<u4") >> 16).astype("<u2")
        else:
            values_by_hook[hook.name] = values.astype(np.dtype(dtype).newbyteorder("<"))
    return values_by_hook


def write(folder: Path, dtype: Any, segments: Any = (0, 1, 2), compression: Any = None) -> Store:
    plan, blobs = example_plan(dtype, compression), LocalBlobs(folder)
    write_store(blobs, plan, numbers(dtype, plan), segments)
    return actstore.open(blobs.url)


def rows_of(dataset: Any) -> dict[str, NDArray[Any]]:
    """All columns, in the order of the store."""
    batches = list(dataset.iter_batches(batch_size=None, batch_format="numpy"))
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    order = np.lexsort((columns["position"], columns["sequence"]))
    return {name: column[order] for name, column in columns.items()}


def test_rows_of_chosen_positions(ray: ModuleType, tmp_path: Path) -> None:
    from actstore_workers.ray_data import read_activations

    text = ragged([5, 1, 8, 3, 6, 8], [[0, 4], [], [1, 2, 7], [2], [0, 2, 4], [7]], 8)
    blobs = LocalBlobs(tmp_path)
    write_ragged(blobs, text, ragged_plan(text, is_chosen=True))
    columns = rows_of(read_activations(blobs.url, A))
    places = [(i, p) for i, row in enumerate(text.chosen) for p in row]
    assert list(zip(columns["sequence"], columns["position"], strict=True)) == places
    sequences, positions = map(list, zip(*places, strict=True))
    np.testing.assert_array_equal(columns["token"], text.tokens[sequences, positions])
    np.testing.assert_array_equal(columns[A], text.values[A][sequences, positions])


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_all_rows(ray: ModuleType, tmp_path: Path, stored: str) -> None:
    from actstore_workers.ray_data import read_activations

    store = write(tmp_path, stored, compression="zstd" if stored == "bfloat16" else None)
    dataset = read_activations(store.url, [A, HEADS], override_num_blocks=3)
    assert dataset.count() == N * LENGTH
    columns = rows_of(dataset)
    assert list(columns) == ["sequence", "position", "token", A, HEADS]
    np.testing.assert_array_equal(columns["sequence"], np.repeat(np.arange(N), LENGTH))
    np.testing.assert_array_equal(columns["position"], np.tile(np.arange(LENGTH), N))
    np.testing.assert_array_equal(columns["token"], store.tokens[:].reshape(-1))
    for hook in (A, HEADS):
        assert columns[hook].dtype == ("float16" if stored == "float16" else "float32")
        np.testing.assert_array_equal(
            columns[hook], store[hook].numpy().reshape(columns[hook].shape).astype("f4")
        )


def test_types(ray: ModuleType, tmp_path: Path) -> None:
    from actstore_workers.ray_data import read_activations

    store = write(tmp_path, "bfloat16")
    raw = rows_of(read_activations(store.url, A, dtype="uint16"))[A]
    np.testing.assert_array_equal(raw, store[A].rows[:].reshape(raw.shape))
    half = rows_of(read_activations(store.url, A, dtype="float16"))[A]
    assert half.dtype == "float16"
    np.testing.assert_array_equal(half, store[A].numpy().reshape(half.shape).astype("f2"))


def test_one_task_a_group_of_segments(ray: ModuleType, tmp_path: Path) -> None:
    from actstore_workers.ray_data import ActivationsDatasource, ReadSpec, committed_segments

    store = write(tmp_path, "float32", segments=(0, 2))
    assert committed_segments(store, [A]) == [range(SEGMENT), range(2 * SEGMENT, N)]
    sequence_nbytes = LENGTH * (16 + 16 * 4)
    spec = ReadSpec(store.url, (A,), "float32", False, 5 * sequence_nbytes)
    source = ActivationsDatasource(store, spec)
    assert source.estimate_inmemory_data_size() == (SEGMENT + 5) * sequence_nbytes
    tasks = source.get_read_tasks(200)
    assert [task.metadata.num_rows for task in tasks] == [SEGMENT * LENGTH, 5 * LENGTH]
    blocks = [[block.num_rows // LENGTH for block in task()] for task in tasks]
    assert blocks == [[5, 5, 5, 1], [5]]
    assert all(block.nbytes <= spec.block_nbytes * 1.1 for task in tasks for block in task())
    assert [task.metadata.num_rows for task in source.get_read_tasks(1)] == [(SEGMENT + 5) * LENGTH]


def test_runs(ray: ModuleType, tmp_path: Path) -> None:
    from actstore_workers.ray_data import committed_segments

    blobs, first = LocalBlobs(tmp_path), example_plan()
    write_run(blobs, first)
    write_run(blobs, tokens_run("0001"), segments=[1])
    write_run(blobs, hooks_run("0002", MLP_OUT, over=first, segment_size=24), segments=[1])
    store = actstore.open(blobs.url)
    assert committed_segments(store, [A])[-2:] == [range(2 * SEGMENT, N), range(N + SEGMENT, N + 2 * SEGMENT)]
    assert committed_segments(store, [A, MLP_OUT]) == [range(24, 32), range(32, N)]
    assert committed_segments(store, [MLP_OUT]) == [range(24, N)]


def test_padding(ray: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actstore_workers.ray_data import read_activations
    from tests.store import example

    lengths = np.arange(N, dtype="<i4") % LENGTH + 1
    tokens = example.example_tokens
    monkeypatch.setattr(example, "example_tokens", lambda plan: dict(tokens(plan)) | {"lengths": lengths})
    store = write(tmp_path, "float32")
    columns = rows_of(read_activations(store.url, A, drop_padding=True))
    is_real = np.arange(LENGTH) < lengths[:, None]
    np.testing.assert_array_equal(columns["token"], store.tokens[:][is_real])
    np.testing.assert_array_equal(columns[A], store[A].numpy()[is_real])


def test_refused(ray: ModuleType, tmp_path: Path) -> None:
    from actstore_workers.ray_data import read_activations

    store = write(tmp_path / "store", "float32")
    options: Any
    for options, message in (
        ({"dtype": "int8"}, "dtype is 'int8'; it can be float16, float32, float64, uint16"),
        ({"dtype": "uint16"}, "dtype='uint16' is for the bits of bfloat16, and .* has float32"),
    ):
        with pytest.raises(JobError, match=message):
            read_activations(store.url, A, **options)
    with pytest.raises(JobError, match="no hook is named"):
        read_activations(store.url, [])
    with pytest.raises(HookError, match="does not hold"):
        read_activations(store.url, MLP_OUT)
    empty = write(tmp_path / "empty", "float32", segments=())
    with pytest.raises(NotCommittedError, match="no sequence of .* is committed for"):
        read_activations(empty.url, A)


def test_the_page(ray: ModuleType, tmp_path: Path) -> None:
    page = (DOCS / "training-others.md").read_text(encoding="utf-8")
    code = page.split(RAY)[1]
    for place, here in (
        ("actstore-demo/store", write(tmp_path, "float32").url),
        ("blocks.2.hook_resid_post", A),
    ):
        assert place in code
        code = code.replace(place, here)
    assert [row["position"] for row in run_page(code)["rows"]] == [1, 2]
