"""Analyses of a served store: the same bits as of the store itself, also where it changes meanwhile."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

import actstore
from actstore.analysis import Scanned, scan, top_activations
from actstore.analysis.features import Directions, Neurons
from actstore.analysis.scanning import unit as unit_module
from actstore.analysis.scanning.scan import Progress
from actstore.analysis.top.top_activations import TopRows
from actstore.cli.main import cli
from actstore.errors import JobError, NotCommittedError, StoreReplacedError
from actstore.storage.local import LocalBlobs
from actstore.store.records.seal import seal, unseal
from tests.analysis.stores import HOOK, D, store_of
from tests.query.running import Running, running
from tests.query.stores import COMPRESSED, GROWN, SLOTS, WHOLE
from tests.store.example import HOOKS
from tests.store.runs import MLP_OUT, hooks_run, write_run

N = 96


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(unit_module, "_UNIT_ROWS", 64)


def reductions(store: actstore.Store) -> dict[str, Any]:
    size = int(np.prod(store[HOOKS[0]].shape[2:]))
    directions = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    return {
        "directions": TopRows(HOOKS[0], Directions(directions), 7),
        "neurons": TopRows(HOOKS[1], Neurons((0, 2)), 3, per="sequence"),
    }


def same(ours: Scanned, theirs: Scanned) -> None:
    for name in ours.results:
        for left, right in zip(
            ours.results[name].arrays().values(), theirs.results[name].arrays().values(), strict=True
        ):
            assert left.tobytes() == right.tobytes()
    assert (ours.n_rows, ours.n_not_finite) == (theirs.n_rows, theirs.n_not_finite)


@pytest.mark.parametrize("direct", [False, None, True])
@pytest.mark.parametrize("name", [WHOLE, COMPRESSED, SLOTS])
def test_served_stores_give_the_same_bits(
    stores: Path, server: Running, name: str, direct: bool | None
) -> None:
    local, remote = actstore.open(str(stores / name)), server.store(name, direct=direct)
    for options in ({}, {"seqpos": slice(1, 3)}, {"sequences": [0, 3], "drop": [1]}):
        same(scan(remote, reductions(remote), **options), scan(local, reductions(local), **options))


def test_rows_and_documents_of_a_served_store(stores: Path, server: Running) -> None:
    local = top_activations(actstore.open(str(stores / SLOTS)), HOOKS[0], [0, 1], 4)
    remote = top_activations(server.store(SLOTS, direct=False), HOOKS[0], [0, 1], 4)
    for field in ("values", "sequences", "positions", "documents"):
        np.testing.assert_array_equal(getattr(local, field), getattr(remote, field))
    assert remote.to_arrow(text=False).equals(local.to_arrow(text=False))


def test_uncommitted_rows_of_a_served_store(server: Running) -> None:
    store = server.store(GROWN, direct=False)
    with pytest.raises(NotCommittedError, match="not committed"):
        scan(store, {"top": TopRows(MLP_OUT, Neurons((0,)), 1)})


@pytest.fixture
def values() -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((N, 8, D)).astype(np.float32)


def sealed(folder: Path, values: NDArray[np.float32]) -> None:
    store_of(folder, values, dtype="float32")
    seal(LocalBlobs(folder))


@pytest.fixture
def served(tmp_path: Path, values: NDArray[np.float32]) -> Iterator[Running]:
    """A server of a store that the test may change."""
    (tmp_path / "stores").mkdir()
    sealed(tmp_path / "stores" / "one", values)
    with running(tmp_path, "--root", str(tmp_path / "stores")) as server:
        yield server


def at(n_sequences: int, act: Any) -> Any:
    """Do something once so many sequences are scanned."""
    todo = [act]

    def on_progress(progress: Progress) -> None:
        if todo and progress.n_sequences >= n_sequences:
            todo.pop()()

    return on_progress


def stop() -> None:
    raise KeyboardInterrupt


def test_scan_begun_on_disk_goes_on_over_http(served: Running, tmp_path: Path) -> None:
    local, kept = actstore.open(str(tmp_path / "stores" / "one")), str(tmp_path / "kept")
    whole = scan(local, reductions(local))
    with pytest.raises(KeyboardInterrupt):
        scan(local, reductions(local), resume=kept, on_progress=at(32, stop))
    remote = served.store("one", direct=False)
    again = scan(remote, reductions(remote), resume=kept)
    assert 0 < again.n_units_before < again.n_units
    same(again, whole)


def test_unfinished_store_is_not_taken_for_another_one_that_is_served(
    served: Running, tmp_path: Path, values: NDArray[np.float32]
) -> None:
    """Over HTTP, only the checksums of a finished store tell it from another one with the same plan."""
    store_of(tmp_path / "stores" / "open", values, dtype="float32")
    store, kept = served.store("open", direct=False), str(tmp_path / "kept")
    assert scan(store, reductions(store)).n_rows == N * 8
    with pytest.raises(JobError, match="is not finished, so that .* leave resume out"):
        scan(store, reductions(store), resume=kept)
    local = actstore.open(str(tmp_path / "stores" / "open"))
    assert scan(local, reductions(local), resume=kept).n_rows == N * 8


def test_served_store_that_grows_is_scanned_as_it_was(served: Running, tmp_path: Path) -> None:
    store = served.store("one", direct=False)
    whole = scan(store, reductions(store))
    blobs = LocalBlobs(tmp_path / "stores" / "one")

    def grow() -> None:
        unseal(blobs)
        write_run(blobs, hooks_run("0001", MLP_OUT, over=store.plan))

    same(scan(store, reductions(store), on_progress=at(16, grow)), whole)
    assert MLP_OUT not in store
    assert MLP_OUT in actstore.open(blobs.url)


def test_served_store_that_is_replaced_is_noticed(
    served: Running, tmp_path: Path, values: NDArray[np.float32]
) -> None:
    store, folder = served.store("one", direct=False), tmp_path / "stores" / "one"

    sealed(tmp_path / "other", values + 1)

    def replace() -> None:
        folder.rename(tmp_path / "aside")
        (tmp_path / "other").rename(folder)

    with pytest.raises(StoreReplacedError):
        scan(store, reductions(store), on_progress=at(16, replace))
    top = top_activations(served.store("one", direct=False), HOOK, [0], 1)
    assert top.values[0, 0] == (values + 1)[..., 0].max()


def test_masks_and_globs_of_a_served_store(stores: Path, server: Running) -> None:
    local, remote = actstore.open(str(stores / WHOLE)), server.store(WHOLE, direct=False)
    mask = np.random.default_rng(5).random(local.shape) < 0.1
    bits = [store[HOOKS[0]][mask].view(torch.int16) for store in (remote, local)]
    assert torch.equal(*bits)
    streams = remote.select("blocks.*.hook_resid_post")
    assert list(streams) == list(local.select("blocks.*.hook_resid_post"))
    assert torch.equal(streams[HOOKS[1]][2:4].view(torch.int16), local[HOOKS[1]][2:4].view(torch.int16))
    assert remote.url in remote._repr_html_()


def test_the_command_prints_the_same_of_a_served_store(stores: Path, server: Running) -> None:
    args = ["--hook", HOOKS[0], "--neurons", "0,3", "-k", "2", "--json", "--quiet"]
    printed = [
        CliRunner().invoke(cli, ["top", url, *args], catch_exceptions=False)
        for url in (str(stores / SLOTS), f"{server.url}/v1/stores/{SLOTS}")
    ]
    assert [done.exit_code for done in printed] == [0, 0]
    assert printed[0].stdout == printed[1].stdout
    assert len(json.loads(printed[1].stdout)["rows"]) == 4
    assert "without text" in printed[1].stderr  # the example has no tokenizer


def test_rows_show_what_they_are(stores: Path, server: Running) -> None:
    for store in (actstore.open(str(stores / WHOLE)), server.store(WHOLE, direct=False)):
        assert repr(store.lengths).startswith("<Rows ")
        assert f"{store.lengths.shape} int32" in repr(store.lengths)
