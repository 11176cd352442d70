"""A store, open for reading: what it holds, and what it refuses to show."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actstore
from actstore.errors import HookError, NotCommittedError, StorageError
from actstore.storage.blobs import BlobNotFoundError, Blobs
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import CommitRecord, commit_key, plan_key, read_commit, tokens_key
from actstore.store.records.manifest import RunStatistics, statistics_key
from actstore.store.records.seal import seal
from actstore.store.showing.html_table import html_table
from tests.storage.conftest import KINDS
from tests.store.arrays import bits
from tests.store.example import (
    D_MODEL,
    HOOKS,
    LENGTH,
    SEGMENT,
    N,
    commit_segment,
    example_plan,
    example_tokens,
    example_values,
    write_store,
)

HOOK_Z = HOOKS[2]
RESID_0, RESID_1 = HOOKS[:2]
PLAN_KEY = plan_key("0000")
IN_ORDER = (RESID_0, HOOK_Z, RESID_1)
"""The hooks in the order of the forward."""
EVERYWHERE = pytest.mark.parametrize("blobs", KINDS, indirect=True)
"""A test with storage of every kind, and with S3 through each client."""


def make(blobs: Blobs, dtype: str = "float32", segments: tuple[int, ...] = (0, 1, 2)) -> actstore.Store:
    plan = example_plan(dtype)
    write_store(blobs, plan, example_values(plan), segments)
    return actstore.open(blobs.url)


@EVERYWHERE
def test_store_opens_anywhere(blobs: Blobs) -> None:
    store = make(blobs, "bfloat16")
    assert store.is_complete
    values = example_values(store.plan)
    for hook in HOOKS:
        found = store[hook][14:33]
        assert found.dtype == torch.bfloat16
        np.testing.assert_array_equal(bits(found.view(torch.uint16)), bits(values[hook][14:33]))
    for name, expected in example_tokens(store.plan).items():
        np.testing.assert_array_equal(getattr(store, name)[...], expected)


def test_path_objects_open(local: LocalBlobs) -> None:
    make(local)
    assert actstore.open(local.root).hooks == IN_ORDER


def test_what_a_store_says_of_itself(local: LocalBlobs) -> None:
    store = make(local, segments=(0, 2))
    assert store.hooks == IN_ORDER == tuple(store)
    assert store.shape == (N, LENGTH)
    assert (store.n_committed, store.is_complete) == (2, False)
    assert store.metadata["request"]["model"]["model_type"] == "gpt2"
    assert repr(store) == f"<actstore.Store {local.url}: tiny, 3 hooks, 37 x 8 tokens, 2/3 segments>"
    expected = np.ones(N, dtype=bool)
    expected[SEGMENT : 2 * SEGMENT] = False
    np.testing.assert_array_equal(store.committed_rows(), expected)
    store.metadata["request"] = None
    assert store.metadata["request"] is not None


@EVERYWHERE
def test_place_without_a_store(blobs: Blobs) -> None:
    with pytest.raises(StorageError) as caught:
        actstore.open(blobs.url)
    assert str(caught.value) == f"there is no actstore store at {blobs.url} ({PLAN_KEY} does not exist)"


@EVERYWHERE
def test_rows_appear_when_they_are_committed(blobs: Blobs) -> None:
    store = make(blobs, segments=(0, 2))
    values = example_values(store.plan)
    with pytest.raises(
        NotCommittedError, match=r"sequences 16:17 of acts/blocks.0.hook_resid_post \(segment 1\)"
    ):
        store[RESID_0][16]
    commit_segment(blobs, store.plan, 1, values)
    store.refresh()
    assert store.is_complete
    np.testing.assert_array_equal(bits(store[RESID_0][...]), bits(values[RESID_0]))


def test_shards_without_their_commit_are_absent(local: LocalBlobs) -> None:
    store = make(local)
    local.delete(commit_key("0000", 1))
    store.refresh()
    with pytest.raises(NotCommittedError, match="run the extraction again to complete them"):
        store[RESID_0][16]
    assert np.isnan(
        np.asarray(make(LocalBlobs(local.root / "b"), segments=(0, 2))[RESID_0].zarr[16:32])
    ).all()


def test_tokens_without_their_record_are_absent(local: LocalBlobs) -> None:
    store = make(local)
    local.delete(tokens_key("0000"))
    store.refresh()
    with pytest.raises(NotCommittedError, match="sequences 0:1 of tokens .* are not committed"):
        store.tokens[0]


@EVERYWHERE
def test_missing_shard_is_damage(blobs: Blobs) -> None:
    store = make(blobs)
    blobs.delete(store.plan.activations(store.plan.request.hooks[0]).key(1))
    with pytest.raises(BlobNotFoundError, match="is committed but missing; the store is damaged"):
        store[RESID_0][:]
    assert store[RESID_1][:].shape == (N, LENGTH, D_MODEL)


def test_truncated_shard_is_damage(local: LocalBlobs) -> None:
    store = make(local)
    path = local.root / "acts" / RESID_0 / "c.2.0.0"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"c\.2\.0\.0 has 100 bytes where 512 were expected; .* damaged"):
        store[RESID_0][32]


def test_store_of_a_newer_format_is_refused(local: LocalBlobs) -> None:
    make(local)
    path = local.path(PLAN_KEY)
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(StorageError) as caught:
        actstore.open(local.url)
    assert str(caught.value) == (
        f"{local.url}/{PLAN_KEY} is of store format 2, and this actstore reads up to 1; "
        "upgrade with `pip install -U actstore`"
    )


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        (RESID_0, RESID_0),
        (("resid_post", 1), RESID_1),
        ("blocks.1.hook_resid_pre", RESID_0),
        ("blocks.2.hook_resid_pre", RESID_1),
        (("resid_pre", 2), RESID_1),
    ],
)
def test_other_names_of_a_hook(local: LocalBlobs, asked: Any, stored: str) -> None:
    store = make(local)
    assert asked in store
    assert store[asked].hook == stored
    np.testing.assert_array_equal(bits(store[asked][:]), bits(example_values(store.plan)[stored]))


@pytest.mark.parametrize(
    "asked",
    [
        "blocks.0.hook_resid_pre",  # the embedding: nothing else holds it
        "blocks.3.hook_resid_pre",
        "blocks.2.hook_resid_post",
        "blocks.1.mlp.hook_resid_pre",
        "resid_post",
        "",
        ("resid_mid", 0),
    ],
)
def test_unknown_hook_lists_what_there_is(local: LocalBlobs, asked: Any) -> None:
    store = make(local)
    assert asked not in store
    with pytest.raises(HookError) as caught:
        store[asked]
    held = "blocks.*.hook_resid_post and blocks.1.attn.hook_z"
    assert str(caught.value) == f"{local.url} does not hold {asked!r}; it holds {held}"
    assert isinstance(caught.value, KeyError)


def miscounted(record: CommitRecord, hook: str, change: int | None) -> CommitRecord:
    """A record that counts other tokens that are not finite, or that has no statistics of a hook."""
    statistics = dict(record.statistics)
    count = statistics.pop(hook)
    if change is not None:
        statistics[hook] = count.model_copy(update={"n_not_finite": count.n_not_finite + change})
    return record.model_copy(update={"statistics": statistics})


@pytest.mark.parametrize(
    ("is_sealed", "change", "message"),
    [
        (False, None, "is damaged: run 0000 has no statistics of"),
        (True, None, "is damaged: run 0000 has no statistics of"),
        (True, -1, "do not count as many tokens of .* that are not finite"),
        (True, 1, "do not count as many tokens of .* that are not finite"),
    ],
)
@pytest.mark.parametrize("most_records", [None, 3])
def test_records_that_miscount_what_is_not_finite(
    local: LocalBlobs, is_sealed: bool, change: int | None, message: str, most_records: int | None
) -> None:
    plan = example_plan()
    values = {name: array.copy() for name, array in example_values(plan).items()}
    values[RESID_0][:, :2] = np.nan
    write_store(local, plan, values, range(plan.n_segments))
    if is_sealed:
        seal(local)
    counts = actstore.open(local.url).not_finite(RESID_0, most_records=most_records)
    assert [sequences for sequences, _ in counts] == [range(16), range(16, 32), range(32, N)]
    path = local.path(commit_key(plan.run, 2))
    path.write_bytes(miscounted(read_commit(local, plan, 2), RESID_0, change).to_bytes())
    with pytest.raises(StorageError, match=message):
        actstore.open(local.url).not_finite(RESID_0, most_records=most_records)


def test_damaged_statistics_do_not_say_what_is_finite(local: LocalBlobs) -> None:
    plan = example_plan()
    write_store(local, plan, example_values(plan), range(plan.n_segments))
    seal(local)
    path = local.path(statistics_key(plan.run))
    statistics = RunStatistics.read(local, statistics_key(plan.run)).hooks
    finite = statistics[RESID_0].model_copy(update={"n_not_finite": 0})
    path.write_bytes(RunStatistics(hooks=statistics | {RESID_0: finite}).to_bytes())
    with pytest.raises(StorageError, match="is not the one that the manifest names"):
        actstore.open(local.url).not_finite(RESID_0)


@EVERYWHERE
def test_zarr_sees_the_same_store(blobs: Blobs) -> None:
    store = make(blobs)
    values = example_values(store.plan)
    assert set(store.zarr.keys()) >= {"acts", "tokens", "lengths", "documents", "offsets"}
    np.testing.assert_array_equal(bits(store[HOOK_Z].zarr[10:20]), bits(values[HOOK_Z][10:20]))


def test_opening_a_store_needs_no_torch(local: LocalBlobs, tmp_path: Path) -> None:
    make(local)
    script = f"""
import sys, actstore
store = actstore.open({local.url!r})
store.tokens[0:2], store[{RESID_0!r}].numpy(0)
print([name for name in ("torch", "transformers", "ray", "zarr") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]"


def test_globs_give_several_hooks_in_model_order(local: LocalBlobs) -> None:
    store = make(local)
    streams: Any = store["blocks.*.hook_resid_post"]
    assert list(streams) == [name for name in store.hooks if name.endswith("hook_resid_post")]
    assert len(streams) > 1
    for name, acts in streams.items():
        assert acts.hook == name
        np.testing.assert_array_equal(bits(acts.numpy()), bits(store[name].numpy()))
    assert list(store.select(store.hooks[-1], "blocks.*.hook_resid_post", store.hooks[0])) == [
        name for name in store.hooks if name in {store.hooks[-1], store.hooks[0], *streams}
    ]
    with pytest.raises(HookError, match=r"does not hold 'blocks.\*.hook_mlp_in'"):
        store["blocks.*.hook_mlp_in"]


def test_store_is_a_mapping_of_its_hooks(local: LocalBlobs) -> None:
    store = make(local)
    assert list(store) == list(store.keys()) == list(store.hooks)
    assert len(store) == len(store.hooks)
    assert {name: acts.hook for name, acts in dict(store).items()} == {name: name for name in store.hooks}
    assert store.hooks[0] in store
    assert "blocks.0.nothing" not in store


def test_page_of_a_store_for_notebooks(local: LocalBlobs) -> None:
    plan, store = example_plan(), make(local, segments=(0,))
    page = store._repr_html_()
    assert f"1/{plan.n_segments} segments" in page
    for hook in plan.request.hooks:
        assert f"<td style='text-align:left'>{hook.name}</td>" in page
    assert plan.request.model.name in page
    assert "&lt;b&gt;" in html_table(("a",), [("<b>",)])
