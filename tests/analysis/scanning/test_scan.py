"""Scans: the same bits however the work is divided, interrupted or shared with others."""

import itertools
import shutil
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import actstore
from actstore.analysis.describing.by_token import CountByToken
from actstore.analysis.describing.co_occurrence import CountPairs
from actstore.analysis.features import Directions, Neurons
from actstore.analysis.scanning import unit as unit_module
from actstore.analysis.scanning.block import Block
from actstore.analysis.scanning.reduction import Arrays, Reduction
from actstore.analysis.scanning.scan import Progress, Scanned, scan
from actstore.analysis.scanning.unit import Units
from actstore.analysis.top.sampled_rows import SampledRows
from actstore.analysis.top.top_activations import TopRows
from actstore.errors import JobError, NotCommittedError, StorageError, StoreReplacedError
from actstore.facade import Store
from actstore.storage.local import LocalBlobs
from tests.analysis.stores import HOOK, D, plan_of, store_of
from tests.store.example import example_values, write_store
from tests.store.runs import MLP_OUT, hooks_run, write_run


class Seen:
    """Sums in float32, which depend on the order, and the addresses of all rows."""

    def __init__(self) -> None:
        self.sum: NDArray[np.float32] = np.zeros(D, np.float32)
        self.addresses: NDArray[np.int64] = np.empty(0, np.int64)

    def update(self, block: Block) -> None:
        self.sum += block.values(HOOK).sum(0).numpy()
        self.addresses = np.concatenate([self.addresses, block.addresses])

    def merge(self, other: "Seen") -> None:
        self.sum += other.sum
        self.addresses = np.concatenate([self.addresses, other.addresses])

    def arrays(self) -> Arrays:
        return {"sum": self.sum, "addresses": self.addresses}


@dataclass(frozen=True)
class See:
    """What the rows of a scan are, and a sum that shows any change of order."""

    name: str = "see"

    @property
    def hooks(self) -> tuple[str, ...]:
        return (HOOK,)

    def identity(self) -> str:
        return self.name

    def start(self) -> Seen:
        return Seen()

    def restore(self, arrays: Arrays) -> Seen:
        state = Seen()
        state.sum, state.addresses = arrays["sum"].copy(), arrays["addresses"].copy()
        return state

    def finish(self, state: Seen) -> Seen:
        return state


class Large(Seen):
    """A state of 2 MB."""

    def arrays(self) -> Arrays:
        return {**super().arrays(), "large": np.zeros(1 << 18)}


@dataclass(frozen=True)
class SeeLarge(See):
    name: str = "large"

    def start(self) -> Seen:
        return Large()


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_module, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(unit_module, "_UNIT_ROWS", 96)


@pytest.fixture
def values() -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    scale = random.choice([1, 1e4], (150, 8, 1))
    return np.asarray(random.standard_normal((150, 8, D)) * scale, np.float32)


@pytest.fixture
def store(tmp_path: Path, values: NDArray[np.float32]) -> Store:
    return store_of(tmp_path / "store", values)


def both(store: Store, **options: Any) -> Scanned:
    return scan(store, {"see": See(), "top": TopRows(HOOK, Neurons((0, 5)), 4)}, **options)


def same(left: Scanned, right: Scanned) -> None:
    for name in left.results:
        for ours, theirs in zip(
            left.results[name].arrays().values(), right.results[name].arrays().values(), strict=True
        ):
            assert ours.tobytes() == theirs.tobytes()
    assert left.n_rows == right.n_rows
    assert left.n_not_finite == right.n_not_finite


def test_kept_states_are_read_one_after_the_other(store: Store, tmp_path: Path) -> None:
    """Together, those of a large store do not fit into memory."""
    options: dict[str, Any] = {"resume": str(tmp_path / "kept")}
    whole = scan(store, {"large": SeeLarge()}, **options)
    tracemalloc.start()
    try:
        again = scan(store, {"large": SeeLarge()}, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert again.n_units_before == whole.n_units == 13
    assert again.results["large"].sum.tobytes() == whole.results["large"].sum.tobytes()
    assert peak < 6 * 2**21


def test_every_row_once_in_order(store: Store, values: NDArray[np.float32]) -> None:
    scanned = scan(store, {"see": See()})
    np.testing.assert_array_equal(scanned.results["see"].addresses, np.arange(150 * 8))
    np.testing.assert_allclose(
        scanned.results["see"].sum, values.sum((0, 1), dtype=np.float64), rtol=1e-3, atol=1
    )
    assert (scanned.n_rows, scanned.n_not_finite) == (1200, {HOOK: 0})


@pytest.mark.parametrize("shape", [(1, 1), (1, 128), (7, 40), (1000, 8), (3, 100_000), (10**7, 128)])
def test_units_and_blocks_cover_a_store(shape: tuple[int, int]) -> None:
    units = Units.of(shape)
    numbers = [blocks for index in range(min(len(units), 50)) for blocks in units.blocks(index)]
    assert numbers[0].start == 0
    assert all(left.stop == right.start for left, right in itertools.pairwise(numbers))
    if len(units) <= 50:
        assert numbers[-1].stop == shape[0]


def test_rows_of_special_tokens_and_sequences(store: Store) -> None:
    # The example's tokens count upwards.
    scanned = scan(store, {"see": See()}, drop=[9, 10], sequences=[1, 2, -1], seqpos=slice(1, 4))
    expected = [8 + 3, 16 + 1, 16 + 2, 16 + 3, 149 * 8 + 1, 149 * 8 + 2, 149 * 8 + 3]
    assert scanned.results["see"].addresses.tolist() == expected


def test_interrupted_scan_goes_on(store: Store, tmp_path: Path) -> None:
    whole, folder = both(store), str(tmp_path / "kept")

    def stop(progress: Progress) -> None:
        if progress.n_sequences >= 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both(store, resume=folder, on_progress=stop)
    kept = list((tmp_path / "kept").rglob("*.safetensors"))
    assert 0 < len(kept) < whole.n_units
    again = both(store, resume=folder)
    assert again.n_units_before == len(kept)
    same(whole, again)
    third = both(store, resume=folder)
    assert third.n_units_before == third.n_units
    same(whole, third)


def test_other_scans_do_not_share_what_is_kept(store: Store, tmp_path: Path) -> None:
    folder = str(tmp_path / "kept")
    both(store, resume=folder)
    for options in ({"drop": [9]}, {"sequences": slice(1, None)}, {"seqpos": [0]}):
        assert both(store, resume=folder, **options).n_units_before == 0
    assert scan(store, {"see": See("other")}, resume=folder).n_units_before == 0


def test_damaged_state_is_found(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    both(store, resume=str(folder))
    path = sorted(folder.rglob("*.safetensors"))[3]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"00000003\.safetensors is damaged"):
        both(store, resume=str(folder))


def test_order_of_units_does_not_matter(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = both(store)

    def backwards(spec: Any, pending: Any, resources: Any, on_done: Any) -> None:
        worker = spec.start()
        for index in reversed(pending):
            on_done(worker.run(index))
        worker.close()

    monkeypatch.setattr("actstore.analysis.scanning.scan.find_executor", lambda name: backwards)
    same(whole, both(store))


def test_torch_has_its_threads_back(store: Store) -> None:
    import torch

    before = torch.get_num_threads()
    both(store)
    assert torch.get_num_threads() == before


def test_store_that_grows_is_scanned_as_it_was(store: Store, values: NDArray[np.float32]) -> None:
    expected = both(store)

    def grow(progress: Progress) -> None:
        if progress.n_sequences == 12:
            _add_hook(store)

    same(expected, both(store, on_progress=grow))


def _add_hook(store: Store) -> None:
    write_run(LocalBlobs(Path(store.url)), hooks_run("0001", MLP_OUT, over=store.plan))


def test_store_that_is_replaced_is_noticed(tmp_path: Path, store: Store) -> None:
    def replace(progress: Progress) -> None:
        if progress.n_sequences == 12:
            shutil.rmtree(tmp_path / "store")
            store_of(
                tmp_path / "store", np.ones((150, 8, D), np.float32), dtype="float32", tokens_sha256="0" * 64
            )

    with pytest.raises(StorageError) as raised:
        both(store, on_progress=replace)
    assert isinstance(raised.value, StoreReplacedError) or "missing" in str(raised.value)


def test_uncommitted_rows_are_named(tmp_path: Path) -> None:
    plan = plan_of(40)
    write_store(LocalBlobs(tmp_path), plan, example_values(plan), [0])
    with pytest.raises(NotCommittedError, match="not committed"):
        both(actstore.open(str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sequences": [150]}, "the store has 150"),
        ({"sequences": np.zeros(150, bool)}, "name none of the store"),
        ({"sequences": 1.5}, "give a slice, a list of numbers, or bool"),
        ({"drop": list(range(1200))}, "no row of .* is left"),
    ],
    ids=["outside", "none", "number", "all dropped"],
)
def test_choices_without_rows(store: Store, options: dict[str, Any], says: str) -> None:
    with pytest.raises(JobError, match=says):
        both(store, **options)


def test_progress_tells_what_is_left(store: Store) -> None:
    told: list[Progress] = []
    both(store, on_progress=told.append)
    assert [one.n_sequences for one in told] == sorted(one.n_sequences for one in told)
    assert told[-1].n_sequences == told[-1].n_sequences_in_all == 150
    assert told[-1].seconds_left == 0.0


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """One cluster for this file. The executor joins it, since this process is connected already."""
    from actstore_workers.cluster import cluster

    with cluster(None, num_cpus=2) as connected:
        yield connected


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_ray_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()  # workers have units of the usual size
    random = np.random.default_rng(5)
    store = store_of(tmp_path, random.standard_normal((5000, 8, D)).astype(np.float32))
    directions = Directions(random.standard_normal((3, D)).astype(np.float32))
    reductions: dict[str, Reduction] = {
        "top": TopRows(HOOK, directions, 5),
        "sample": SampledRows(HOOK, directions, 5, 0.5),
        "pairs": CountPairs(HOOK, directions, 0.5),
        "tokens": CountByToken(HOOK, directions),
    }
    inline = scan(store, reductions)
    assert inline.n_units > 3
    same(inline, scan(store, reductions, executor="ray", num_workers=2))
