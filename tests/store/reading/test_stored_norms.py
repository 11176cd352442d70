"""Reading stored norms: as an array of all parts of a store, and through zarr-python."""

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.errors import HookError, NotCommittedError
from actstore.facade import Store
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.storage.opening import open_blobs
from actstore.store.format.plan import Plan
from actstore.store.records.seal import seal
from tests.storage.watched import READS, watched
from tests.store.example import HOOKS, LENGTH, N, example_plan
from tests.store.runs import ATTN_OUT, MLP_OUT, bytes_below, hooks_run, tokens_run, write_run
from tests.store.verifying.test_verify import make_store

KEYS: tuple[Any, ...] = (
    3,
    -1,
    slice(None),
    slice(30, 50),
    slice(5, 70, 7),
    slice(None, None, -3),
    slice(50, 50),
    [40, 2, 38, 2],
    (slice(30, 45), slice(2, 5)),
    (60, 3),
    ([36, 37], slice(None, None, 2)),
    (slice(33, 40), [1, 5]),
    np.arange(2 * N) % 5 == 0,
)


def exact(store: Store, hook: str) -> Any:
    values = store[hook][:].double().flatten(2).numpy()
    return np.linalg.norm(values, axis=2).astype(np.float32)


def grown(blobs: Blobs) -> Plan:
    """Two parts; the second has other hooks than the first, and others beside them in a run of their own."""
    first = make_store(blobs, example_plan(norms=True), sealed=False)
    more = tokens_run("0001", HOOKS[1], HOOKS[0], norms=True)
    write_run(blobs, more)
    write_run(blobs, hooks_run("0002", MLP_OUT, ATTN_OUT, over=first))
    return more


@pytest.mark.parametrize("sealed", [False, True])
def test_norms_of_a_grown_store(blobs: Blobs, sealed: bool) -> None:
    grown(blobs)
    if sealed:
        seal(blobs)
    for check in (None, "first-use"):
        store = actstore.open(blobs.url, check=check)
        for hook in HOOKS[:2]:
            with np.errstate(invalid="ignore", over="ignore"):
                expected = exact(store, hook)
            norms = store[hook].norms
            assert norms.ranges == (range(N), range(N, 2 * N))
            assert (norms.shape, len(norms)) == ((2 * N, LENGTH), 2 * N)
            found = np.asarray(norms)
            np.testing.assert_array_max_ulp(found, expected, maxulp=1)
            for key in KEYS:
                np.testing.assert_array_equal(norms[key], found[key])


def test_norms_that_are_not_stored_are_told(local: LocalBlobs) -> None:
    make_store(local, sealed=False)
    write_run(local, tokens_run("0001", norms=True))
    norms = actstore.open(local.url)[HOOKS[0]].norms
    assert norms.ranges == (range(N, 2 * N),)
    assert norms[N : N + 2].shape == (2, LENGTH)
    for key in (0, slice(N - 1, N + 1), slice(None)):
        with pytest.raises(HookError, match=f"norms of {HOOKS[0]} are not stored of the sequences 0:{N}"):
            norms[key]


def test_norms_of_a_segment_that_is_not_committed_are_absent(local: LocalBlobs) -> None:
    make_store(local, example_plan(norms=True), segments=(0, 2), sealed=False)
    norms = actstore.open(local.url)[HOOKS[0]].norms
    assert norms[0:16].shape == (16, LENGTH)
    with pytest.raises(NotCommittedError, match="of norms/0000 .segment 1. are not committed"):
        norms[10:20]


def test_norms_are_a_zarr_array(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    plan = grown(blobs)
    store = actstore.open(blobs.url)
    for path, run in (("norms/0000", store.plan), ("parts/0001/norms/0001", plan)):
        array: Any = store.zarr[path]
        names = [hook.name for hook in run.norm_hooks]
        assert array.attrs.asdict() == {"hooks": names}
        assert array.metadata.dimension_names == ("sequence", "hook", "position")
        first = 0 if run is not plan else N
        for number, name in enumerate(names):
            expected = store[name].norms[first : first + N]
            np.testing.assert_array_equal(array[:, number], expected)


def test_reading_norms_reads_no_activations() -> None:
    memory = open_blobs(f"memory://{uuid.uuid4().hex}")
    make_store(memory, example_plan(norms=True))
    calls = watched(memory)
    store = actstore.open(memory.url)
    store.blobs = calls
    _ = store[HOOKS[0]].norms[:]
    keys = {key for key in bytes_below(memory) if key.startswith("norms/0000/c.")}
    assert keys <= set(calls.of(READS))
    assert not any(key.startswith("acts/") for key in calls.of(READS))
