"""Norms of a real extraction: in a new store, one that versions without norms have begun, and one that is damaged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actstore
from actstore.extraction.planning.planning import PlannedRun
from actstore.extraction.verify import verify
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import commit_key
from actstore.store.records.manifest import MANIFEST_KEY
from tests.faults.store_bytes import differences, store_bytes
from tests.store.verifying.test_verify import flip

Fields = dict[str, Any]
HOOKS = [
    "blocks.1.hook_mlp_out",
    "blocks.0.attn.hook_z",
    "blocks.0.attn.hook_pattern",
    "blocks.0.ln1.hook_scale",
]


def without_norms(run: PlannedRun) -> PlannedRun:
    """The plan as earlier versions made it."""
    return replace(run, plan=run.plan.model_copy(update={"norms": False}))


def check(url: str, run: str, hook: str) -> None:
    store = actstore.open(url)
    exact = torch.linalg.vector_norm(store[hook][:].double().flatten(2), dim=2).numpy()
    exact[np.arange(store.shape[1]) >= store.lengths[:][:, None]] = np.nan
    np.testing.assert_array_max_ulp(store[hook].norms[:], exact.astype(np.float32), maxulp=1)
    assert hook in next(entry.plan.hook_names for entry in store.runs if entry.plan.run == run)


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_norms_are_of_what_is_stored(fields: Fields, packing: str) -> None:
    job = fields | {"hooks": HOOKS, "segment_size": 64, "dtype": "bfloat16", "packing": packing}
    job |= {"truncate": "right"} if packing == "document" else {}
    actstore.extract(actstore.plan(**job))
    for hook in HOOKS[:2]:
        check(job["out"], "0000", hook)
    store = actstore.open(job["out"])
    assert [hook.name for hook in store.plan.norm_hooks] == sorted(HOOKS[:2])
    assert store[HOOKS[2]].norms.ranges == store[HOOKS[3]].norms.ranges == ()
    if packing == "document":
        assert np.isnan(store[HOOKS[0]].norms[:]).sum() == 100 * 32 - store.n_tokens > 0


def test_hooks_without_norms_have_no_array_of_them(fields: Fields) -> None:
    job = fields | {"hooks": HOOKS[2:], "segment_size": 64}
    actstore.extract(actstore.plan(**job))
    assert not (Path(job["out"]) / "norms").exists()
    assert verify(job["out"]).findings == ()


def test_a_store_that_an_earlier_version_began_goes_on_without_norms(fields: Fields, tmp_path: Path) -> None:
    actstore.extract(without_norms(actstore.plan(**fields)))
    whole = store_bytes(fields["out"])
    assert not any(key.startswith("norms/") for key in whole)
    blobs = LocalBlobs(fields["out"])
    for key in (MANIFEST_KEY, commit_key("0000", 2), commit_key("0000", 6)):
        blobs.delete(key)
    actstore.extract(actstore.plan(**fields))
    assert differences(store_bytes(fields["out"]), whole) == []


def test_a_store_of_an_earlier_version_grows_with_norms(fields: Fields, tmp_path: Path) -> None:
    actstore.extract(without_norms(actstore.plan(**fields)))
    before = store_bytes(fields["out"])
    actstore.extract(actstore.plan(**fields | {"hooks": HOOKS, "segment_size": 64}))
    after = store_bytes(fields["out"])
    run = actstore.open(fields["out"]).runs[1].plan
    assert len(after) == len(before) + run.n_objects + 1  # the group of norms
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {MANIFEST_KEY}
    check(fields["out"], "0001", HOOKS[1])
    assert actstore.open(fields["out"])["blocks.0.hook_resid_post"].norms.ranges == ()
    actstore.extract(actstore.plan(**fields | {"max_tokens": 130 * 32}, append=True))
    store = actstore.open(fields["out"])
    assert store["blocks.0.hook_resid_post"].norms.ranges == (range(100, 130),)
    assert verify(fields["out"]).findings == ()


def test_damaged_norms_are_made_again_without_the_model(fields: Fields) -> None:
    actstore.extract(actstore.plan(**fields))
    whole = store_bytes(fields["out"])
    flip(LocalBlobs(fields["out"]), "norms/0000/c.2.0.0", 400)
    verification = verify(fields["out"], repair=True)
    assert [(finding.key, finding.segment) for finding in verification.damage] == [("norms/0000/c.2.0.0", 2)]
    assert (verification.n_removed, verification.n_rewritten) == (0, 1)
    assert differences(store_bytes(fields["out"]), whole) == []


def test_norms_of_a_plan_are_announced(fields: Fields) -> None:
    run = actstore.plan(**fields)
    layout = run.plan.norm_array()
    bare = without_norms(run)
    assert run.plan.n_objects == bare.plan.n_objects + 7 + 2
    assert run.plan.nbytes == bare.plan.nbytes + layout.nbytes
    assert run.nbytes_to_write == bare.nbytes_to_write + layout.nbytes
    actstore.extract(run)
    assert len(store_bytes(fields["out"])) == run.plan.n_objects
