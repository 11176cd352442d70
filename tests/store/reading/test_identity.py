"""What tells a store from all others: its plans and the checksums of its shards, wherever it lies."""

import shutil
from pathlib import Path

import numpy as np

from actstore.storage.local import LocalBlobs
from actstore.store.reading.identity import Identity, continues, identity_of
from actstore.store.records.run import read_runs
from actstore.store.records.seal import seal, unseal
from tests.store.example import commit_segment, example_plan, example_values, write_store
from tests.store.runs import MLP_OUT, begin_run, hooks_run

PLAN = example_plan()


def written(folder: Path, shift: int = 0) -> LocalBlobs:
    """A store whose rows are shifted; the plan does not say so."""
    blobs = LocalBlobs(folder)
    values = {name: np.roll(array, shift, axis=0) for name, array in example_values(PLAN).items()}
    write_store(blobs, PLAN, values, range(PLAN.n_segments))
    return blobs


def identity(blobs: LocalBlobs) -> Identity:
    return identity_of(read_runs(blobs))


def test_another_store_of_the_same_plan_is_another(tmp_path: Path) -> None:
    stores = [written(tmp_path / "one"), written(tmp_path / "other", shift=1)]
    for blobs in stores:
        seal(blobs)
    one, other = map(identity, stores)
    assert not continues(one, other)
    assert not continues(other, one)


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    blobs = written(tmp_path / "one")
    seal(blobs)
    shutil.copytree(blobs.root, tmp_path / "copy")
    assert identity(LocalBlobs(tmp_path / "copy")) == identity(blobs)


def test_a_store_that_grows_goes_on(tmp_path: Path) -> None:
    """Each state continues as all later ones, and never as an earlier one."""
    blobs, later = written(tmp_path / "one"), hooks_run("0001", MLP_OUT)
    states = [identity(blobs)]
    seal(blobs)
    states.append(identity(blobs))
    unseal(blobs)
    begin_run(blobs, later)
    states.append(identity(blobs))
    for index in range(later.n_segments):
        commit_segment(blobs, later, index, example_values(later))
    seal(blobs)
    states.append(identity(blobs))
    assert len(set(states)) == 4
    for i, earlier in enumerate(states):
        assert [continues(earlier, each) for each in states] == [j >= i for j in range(4)]
