"""Splits: by document, by class, and the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from actstore.analysis.probes.rows.labels import Labels
from actstore.analysis.probes.rows.splits import HELD_OUT, UNUSED, split_of
from actstore.errors import JobError


def labels_from(groups: list[int], values: list[int]) -> Labels:
    return Labels(np.array(values, np.int32), np.array(groups, np.int32), ("a", "b"))


def two_classes(n: int) -> Labels:
    """Documents of three rows, one in three of the second class, and a row without a label after each."""
    groups = np.repeat(np.arange(n), 4)
    values = np.repeat(np.arange(n) % 3 == 0, 4).astype(np.int32)
    groups[3::4], values[3::4] = -1, -1
    return Labels(values, groups.astype(np.int32), ("a", "b"))


def parts_of_documents(labels: Labels, parts: NDArray[np.int8]) -> dict[int, set[int]]:
    rows = np.flatnonzero(labels.groups >= 0)
    return {
        group: set(parts[rows[labels.groups[rows] == group]].tolist())
        for group in set(labels.groups[rows].tolist())
    }


@given(
    st.integers(12, 60), st.floats(0.2, 0.8), st.integers(0, 5), st.lists(st.floats(0.05, 0.95), max_size=3)
)
def test_documents_are_never_divided(n: int, held_out: float, seed: int, curve: list[float]) -> None:
    labels = two_classes(n)
    split = split_of(labels, held_out, seed, curve)
    of_documents = parts_of_documents(labels, split.parts)
    assert all(len(parts) == 1 for parts in of_documents.values())
    assert (split.parts[labels.groups < 0] == UNUSED).all()
    parts = np.array([min(found) for found in of_documents.values()])
    assert split.n_held_out == (parts == HELD_OUT).sum()
    counts = [((parts >= 0) & (parts <= k)).sum() for k in range(len(split.fractions))]
    assert list(split.n_documents) == counts
    assert counts[-1] + split.n_held_out == n


def test_each_class_has_its_share() -> None:
    labels = two_classes(300)
    split = split_of(labels, 0.2, 0, (0.25,))
    for label, n in ((0, 200), (1, 100)):
        parts = split.parts[(labels.values == label)]
        assert (parts == HELD_OUT).sum() == 3 * n // 5
        assert (parts == 0).sum() == pytest.approx(3 * 0.25 * 0.8 * n, abs=3)


def test_as_many_fractions_as_parts_have_numbers() -> None:
    labels = two_classes(600)
    fractions = np.linspace(0.005, 0.995, 128).tolist()
    split = split_of(labels, 0.2, 0, fractions[:-1])
    assert (split.parts[labels.groups >= 0] >= HELD_OUT).all()
    assert split.parts.max() == 127
    assert split.n_documents[-1] == 480
    with pytest.raises(JobError, match="curve holds 128 fractions; give 127 at most"):
        split_of(labels, 0.2, 0, fractions)


def test_seed_decides() -> None:
    labels = two_classes(60)
    first, again, other = (split_of(labels, 0.2, seed).parts for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_fraction_of_the_curve_is_in_all_larger_ones() -> None:
    """Whatever other fractions there are."""
    labels = two_classes(120)
    few, many = split_of(labels, 0.2, 0, (0.5,)), split_of(labels, 0.2, 0, (0.1, 0.5, 0.7))
    assert many.fractions == (0.1, 0.5, 0.7, 1.0)
    np.testing.assert_array_equal(few.parts == 0, (many.parts >= 0) & (many.parts <= 1))


@pytest.mark.parametrize(
    ("groups", "values", "says"),
    [
        ([0, 0, 0], [0, 1, 0], "all labelled rows are of one document"),
        ([0, 0, 1, 2, 3], [1, 1, 0, 0, 0], "no (held-out|training) document has the label 'b'"),
    ],
    ids=["one document", "class of one document"],
)
def test_too_few_documents(groups: list[int], values: list[int], says: str) -> None:
    with pytest.raises(JobError, match=says):
        split_of(labels_from(groups, values), 0.3, 0)
