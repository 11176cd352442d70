"""Runs: which folders are runs, and what is known of each."""

from typing import Any

import numpy as np
import pytest

import actstore
from actstore.errors import HookError, NotCommittedError, StorageError
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.store.format.plan import RUNS, Plan
from actstore.store.records.commit import commit_key, plan_key, tokens_key
from actstore.store.records.run import read_runs, run_names
from actstore.store.records.seal import seal, unseal
from tests.store.arrays import bits
from tests.store.example import HOOKS, LENGTH, SEGMENT, N, example_plan, example_tokens
from tests.store.runs import ATTN_OUT, MLP_OUT, begin_run, hooks_run, tokens_run, write_run

FIRST = example_plan()


def test_a_folder_without_a_plan_is_no_run(blobs: Blobs) -> None:
    write_run(blobs, FIRST)
    begin_run(blobs, hooks_run("0003", MLP_OUT))
    for key in (f"{RUNS}/0001/commits/00000000.json", f"{RUNS}/0002/tokens.json"):
        blobs.create(key, [b"{}"])
    for name in ("1", "00004", "abcd", "-001", "\u0660\u0660\u0660\u0665"):
        blobs.create(f"{RUNS}/{name}/plan.json", [b"{}"])
    assert run_names(blobs) == ["0000", "0003"]
    assert [run.plan.run for run in read_runs(blobs)] == ["0000", "0003"]


def test_no_run_is_no_store(blobs: Blobs) -> None:
    assert read_runs(blobs) == ()
    blobs.create(f"{RUNS}/0000/commits/00000000.json", [b"{}"])
    assert read_runs(blobs) == ()


@pytest.mark.parametrize("is_sealed", [True, False])
def test_what_a_run_says_of_itself(blobs: Blobs, is_sealed: bool) -> None:
    write_run(blobs, FIRST)
    write_run(blobs, hooks_run("0001", MLP_OUT))
    if is_sealed:
        seal(blobs)
    first, second = read_runs(blobs)
    assert (first.is_complete, second.is_complete) == (True, True)
    assert (first.has_tokens, second.has_tokens) == (True, False)
    assert (first.finished is not None, second.finished is not None) == (is_sealed, is_sealed)
    assert sorted(first.committed) == [0, 1, 2]
    assert [second.hook(name) is not None for name in (MLP_OUT, HOOKS[0])] == [True, False]


def test_a_finished_run_among_growing_ones_is_not_listed_again(local: LocalBlobs) -> None:
    write_run(local, FIRST)
    seal(local)
    unseal(local)
    begin_run(local, hooks_run("0001", MLP_OUT))
    local.delete(commit_key("0000", 1))  # not noticed, since the manifest lists the segment
    first, second = read_runs(local)
    assert (first.is_complete, second.is_complete) == (True, False)


def test_committed_rows_of_a_run(local: LocalBlobs) -> None:
    write_run(local, FIRST, segments=(0, 2))
    (run,) = read_runs(local)
    expected = np.ones(N, bool)
    expected[SEGMENT : 2 * SEGMENT] = False
    np.testing.assert_array_equal(run.committed_rows(), expected)
    assert not run.is_complete


def test_a_store_that_lost_its_first_plan_is_damaged(local: LocalBlobs) -> None:
    write_run(local, FIRST)
    write_run(local, hooks_run("0001", MLP_OUT))
    local.delete(plan_key("0000"))
    with pytest.raises(StorageError, match=r"0000/plan\.json is missing, and other runs are there"):
        actstore.open(local.url)


def test_a_run_over_tokens_that_are_gone_is_damage(local: LocalBlobs) -> None:
    write_run(local, FIRST)
    over = tokens_run("0001")
    write_run(local, over)
    write_run(local, hooks_run("0002", MLP_OUT, over=over))
    local.delete(plan_key("0001"))
    with pytest.raises(StorageError, match="run 0002 is over the tokens of run 0001, which is missing"):
        actstore.open(local.url)


def test_a_plan_of_another_run_is_damage(local: LocalBlobs) -> None:
    write_run(local, FIRST)
    local.create(plan_key("0001"), [FIRST.to_bytes()])
    with pytest.raises(StorageError, match=r"0001/plan\.json is damaged: it is the plan of run 0000"):
        actstore.open(local.url)


def other_tokens(n: int) -> Plan:
    return tokens_run("0001", HOOKS[0], MLP_OUT, n_sequences=n, n_tokens=n * LENGTH)


@pytest.mark.parametrize("is_sealed", [True, False])
def test_parts_follow_each_other(blobs: Blobs, is_sealed: bool) -> None:
    # 0: three hooks over 37 rows. 1: one of them and another one over 20 more. 2, 3: the hooks that each part
    # lacks.
    plans: list[Plan] = [FIRST, other_tokens(20)]
    plans.append(hooks_run("0002", MLP_OUT, segment_size=8))
    plans.append(hooks_run("0003", HOOKS[1], ATTN_OUT, over=plans[1]))
    values = [write_run(blobs, plan) for plan in plans]
    if is_sealed:
        seal(blobs)
    store = actstore.open(blobs.url)
    assert store.shape == (57, LENGTH)
    assert store.n_tokens == 57 * LENGTH
    assert store.n_segments == sum(plan.n_segments for plan in plans) == store.n_committed
    assert set(store.hooks) == {*HOOKS, MLP_OUT, ATTN_OUT}
    whole: dict[str, Any] = {
        HOOKS[0]: [values[0][HOOKS[0]], values[1][HOOKS[0]]],
        MLP_OUT: [values[2][MLP_OUT], values[1][MLP_OUT]],
        HOOKS[1]: [values[0][HOOKS[1]], values[3][HOOKS[1]]],
    }
    for hook, parts in whole.items():
        expected = np.concatenate(parts)
        np.testing.assert_array_equal(bits(store[hook][:]), bits(expected))
        np.testing.assert_array_equal(bits(store[hook][30:45, 2:5]), bits(expected[30:45, 2:5]))
        np.testing.assert_array_equal(bits(store[hook][[56, 0, 37, 36]]), bits(expected[[56, 0, 37, 36]]))
    for name in ("tokens", "lengths", "documents", "offsets"):
        parts = [example_tokens(plan)[name] for plan in plans[:2]]
        np.testing.assert_array_equal(getattr(store, name)[:], np.concatenate(parts))
    why = "this hook was not extracted over the tokens of run 000{}; extract it over them"
    with pytest.raises(NotCommittedError, match=why.format(1)):
        store[HOOKS[2]][37]
    with pytest.raises(NotCommittedError, match=why.format(0)):
        store[ATTN_OUT][36:38]
    np.testing.assert_array_equal(bits(store[HOOKS[2]][:37]), bits(values[0][HOOKS[2]]))
    np.testing.assert_array_equal(bits(store[ATTN_OUT][37:]), bits(values[3][ATTN_OUT]))
    assert not store.committed_rows().any()  # no row has all hooks
    with pytest.raises(HookError, match="does not hold"):
        store["blocks.0.hook_resid_mid"]


def test_tokens_of_a_part_that_has_none_yet_are_absent(local: LocalBlobs) -> None:
    write_run(local, FIRST)
    begin_run(local, other_tokens(20))
    local.delete(tokens_key("0001"))
    store = actstore.open(local.url)
    np.testing.assert_array_equal(store.tokens[:N], example_tokens(FIRST)["tokens"])
    with pytest.raises(NotCommittedError, match="run the extraction again"):
        store.tokens[N]
