"""Examples of activations against loops over all values in memory."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import actstore
from actstore import analysis
from actstore.analysis.feature_activations.distribution import Distribution
from actstore.analysis.feature_activations.examples import Examples
from actstore.analysis.features import Directions, Neurons
from actstore.analysis.scanning import unit as unit_module
from actstore.analysis.scanning.reduction import Reduction
from actstore.analysis.scanning.scan import scan
from actstore.errors import JobError
from actstore.storage.local import LocalBlobs
from tests.analysis.scanning.orders import same_arrays, same_bits_in_any_order
from tests.analysis.stores import HOOK, D, store_of
from tests.store.slots import ragged, ragged_plan, write_ragged

Values = NDArray[np.float32]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks and units, so that a small store has many."""
    monkeypatch.setattr(unit_module, "_BLOCK_ROWS", 16)
    monkeypatch.setattr(unit_module, "_UNIT_ROWS", 64)


def splitmix64(address: int, seed: int) -> int:
    """The finaliser of Steele, Lea and Flood (2014), with Python's integers."""
    mixed = (address + (seed + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


def expected(
    values: Values, k: int, n_intervals: int, n_samples: int, above: float, seed: int
) -> list[tuple[int, int, float, int]]:
    """(interval, sequence, value, position) of each example of a feature, from [n_sequences, width], NaN where no row
    was taken.
    """
    n, width = values.shape
    there = [(float(values[s, p]), s, p) for s in range(n) for p in range(width) if np.isfinite(values[s, p])]
    best: dict[int, tuple[float, int, int]] = {}
    for value, s, p in there:
        if value > above and (s not in best or value > best[s][0]):
            best[s] = (value, s, p)
    top = sorted(best.values(), key=lambda one: (-one[0], one[1], one[2]))[:k]
    found = [(-1, s, value, p) for value, s, p in top]
    largest = max((value for value, _, _ in there), default=0.0)
    if largest <= 0:
        return found
    whole = 2.0**-200
    while whole <= largest:
        whole *= 2
    for interval in reversed(range(n_intervals)):
        low, high = whole / n_intervals * interval, whole / n_intervals * (interval + 1)
        inside = [one for one in there if low <= one[0] < high and one[0] > 0]
        inside.sort(key=lambda one: splitmix64(one[1] * width + one[2], seed))
        found += [(interval, s, value, p) for value, s, p in inside[:n_samples]]
    return found


def expect_same(
    found: analysis.ActivationExamples, values: Values, window: tuple[int, int], **options: Any
) -> None:
    """Compare with values [n_sequences, width, n_features] in memory, by position."""
    before, after = window
    assert found.n_features == values.shape[-1]
    assert len(found) == found.starts[-1]
    for feature in range(values.shape[-1]):
        column = values[..., feature]
        places = found.of(feature)
        got = [
            (
                int(found.intervals[i]),
                int(found.sequences[i]),
                float(found.values[i]),
                int(found.positions[i]),
            )
            for i in places
        ]
        assert got == expected(column, **options)
        padded = np.pad(column, ((0, 0), (before, after)), constant_values=np.nan)
        for i in places:
            position = int(found.positions[i])
            np.testing.assert_array_equal(
                found.windows[i], padded[found.sequences[i], position : position + before + 1 + after]
            )
            assert found.windows[i, found.before] == found.values[i]
            assert found.features[i] == feature


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_same_as_loops(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    n = data.draw(st.integers(1, 50))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # Few different values, so that many are equal, of growing size, so that intervals grow.
    values = random.integers(-3, 6, (n, 8, D)) * 2.0 ** (np.arange(n) // 8)[:, None, None]
    values *= random.random((n, 8, D)) < data.draw(st.sampled_from([0.1, 1.0]))
    stored = values.astype(np.float32)
    neurons = data.draw(st.lists(st.integers(0, D - 1), min_size=1, max_size=3, unique=True))
    window = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    options: dict[str, Any] = {
        "k": data.draw(st.integers(0, 5)),
        "n_intervals": data.draw(st.sampled_from([1, 4, 16])),
        "n_samples": data.draw(st.integers(0, 3)),
        "above": data.draw(st.sampled_from([0.0, 4.0])),
        "seed": data.draw(st.integers(0, 3)),
    }
    seqpos = data.draw(st.sampled_from([None, slice(1, None), [0, 5]]))
    chosen = random.random(n) < 0.7
    chosen[random.integers(n)] = True
    taken = np.zeros((n, 8), bool)
    taken[:, seqpos if seqpos is not None else slice(None)] = True
    taken &= chosen[:, None]
    store = store_of(tmp_path_factory.mktemp("examples"), stored, dtype="float32")
    found = analysis.activation_examples(
        store, HOOK, neurons, before=window[0], after=window[1], seqpos=seqpos, sequences=chosen, **options
    )
    expect_same(found, np.where(taken[..., None], stored[..., neurons], np.nan), window, **options)


def test_values_that_are_not_finite_are_no_examples(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((40, 8, D)).astype(np.float32)
    store = store_of(tmp_path, values, dtype="float32")
    found = analysis.activation_examples(store, HOOK, lambda rows: rows[:, :2].log(), 4, before=0, after=0)
    with np.errstate(invalid="ignore"):
        logs = np.log(values[..., :2])
    for feature in range(2):
        want = expected(logs[..., feature], 4, 16, 5, -np.inf, 0)
        got = [
            (int(found.intervals[i]), int(found.sequences[i]), int(found.positions[i]))
            for i in found.of(feature)
        ]
        assert got == [(interval, sequence, position) for interval, sequence, _, position in want]


def test_windows_are_in_positions_where_only_some_are_stored(tmp_path: Path) -> None:
    chosen = [[0, 4], [], [1, 2, 7], [2], [0, 2, 4], [7]]
    text = ragged([5, 1, 8, 3, 6, 8], chosen, 8)
    blobs = LocalBlobs(tmp_path)
    write_ragged(blobs, text, ragged_plan(text, is_chosen=True))
    values = np.full((6, 8, 3), np.nan, np.float32)
    for i, row in enumerate(chosen):
        values[i, row] = text.values[HOOK].reshape(6, 8, -1)[i, row, :3]
    found = analysis.activation_examples(
        actstore.open(blobs.url), HOOK, [0, 1, 2], 4, n_samples=0, before=3, after=2
    )
    expect_same(found, values, (3, 2), k=4, n_intervals=16, n_samples=0, above=-np.inf, seed=0)


def test_resumed_and_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    values = (random.standard_normal((150, 8, D)) * 2.0 ** random.integers(-4, 9, (150, 1, 1))).astype(
        np.float32
    )
    store = store_of(tmp_path / "store", values)
    reduction = Examples(HOOK, Neurons((0, 5)), 3, 8, 2, 2, 1, 0.0)
    same_bits_in_any_order(store, reduction, tmp_path / "kept", monkeypatch)


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
    both: dict[str, Reduction] = {
        "examples": Examples(HOOK, directions, 3, 8, 2, 2, 1, 0.0),
        "counts": Distribution(HOOK, directions),
    }
    inline = scan(store, both)
    assert inline.n_units > 3
    same_arrays(inline, scan(store, both, executor="ray", num_workers=2))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": -1}, "k is -1"),
        ({"n_samples": -2}, "n_samples is -2"),
        ({"before": -1}, "before is -1"),
        ({"n_intervals": 12}, "power of two"),
        ({"n_intervals": 0}, "power of two"),
    ],
    ids=["k", "samples", "window", "no power of two", "no intervals"],
)
def test_arguments_that_are_not_valid(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    store = store_of(tmp_path, np.ones((9, 8, D), np.float32))
    with pytest.raises(JobError, match=says):
        analysis.activation_examples(store, HOOK, [0], **options)
