"""Labels by sequence, by token, and of kept columns; which documents rows belong to; what is refused."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import actstore
from actstore.analysis.probes.rows.labels import labels_of
from actstore.demo import MODEL_PATH
from actstore.errors import JobError, TokensError
from actstore.facade import Store
from tests.analysis.probes.stores import WIDTH, store_of_rows, values_of

N = 6
TEXTS = ["to be", "or not to be, that is the question", "who's there", "nay, answer me", "long live the king"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Without documents: each sequence counts as one."""
    return store_of_rows(tmp_path_factory.mktemp("labels") / "store", values_of(0, N))


@pytest.fixture(scope="module", params=["all", "last:2"])
def prompts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Prompts with columns; a BOS token, which belongs to no document, in front of each."""
    folder = tmp_path_factory.mktemp("prompts")
    table = pd.DataFrame(
        {
            "text": TEXTS,
            "kind": ["verse", "verse", "prose", None, "prose"],
            "score": [0.5, np.nan, 2.0, -1.0, 3.0],
            "number": [1, 0, 1, 0, 2],
            "flag": [True, False, True, True, False],
            "play": ["b", "a", "b", "a", "a"],
        }
    )
    actstore.extract(
        model=str(MODEL_PATH),
        tokens=table,
        keep=["kind", "score", "number", "flag", "play"],
        hooks=["blocks.0.hook_resid_post"],
        positions=request.param,
        out=str(folder / "store"),
    )
    return actstore.open(str(folder / "store"))


def by_sequence(store: Store, labels: Any, **options: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """The value and the group of the rows of each sequence, which must agree."""
    found = labels_of(
        store, labels, options.pop("groups", None), are_classes=options.pop("are_classes", True)
    )
    values, groups = found.values.reshape(store.shape), found.groups.reshape(store.shape)
    used = store.entries.in_use(slice(None))
    assert (groups[~used] == -1).all()
    firsts = []
    for array in (values, groups):
        for row, is_used in zip(array, used, strict=True):
            assert len(set(row[is_used].tolist()) - {np.nan}) <= 1 or np.isnan(row[is_used]).all()
        firsts.append(array[:, 0])
    return firsts[0], firsts[1]


@pytest.mark.parametrize(
    ("column", "classes", "expected"),
    [
        ("kind", ("prose", "verse"), [1, 1, 0, -1, 0]),
        ("number", (0, 1, 2), [1, 0, 1, 0, 2]),
        ("flag", (False, True), [1, 0, 1, 1, 0]),
    ],
)
def test_kept_columns(prompts: Store, column: str, classes: tuple[Any, ...], expected: list[int]) -> None:
    values, groups = by_sequence(prompts, column)
    assert labels_of(prompts, column, None, are_classes=True).classes == classes
    assert values.tolist() == expected
    labelled = groups[groups >= 0].tolist()
    assert labelled == list(range(len(labelled)))


def test_numbers_of_a_column(prompts: Store) -> None:
    values, groups = by_sequence(prompts, "score", are_classes=False)
    np.testing.assert_array_equal(values, [0.5, np.nan, 2.0, -1.0, 3.0])
    assert groups[1] == -1


def test_groups_stay_together(prompts: Store) -> None:
    _, groups = by_sequence(prompts, "number", groups="play")
    assert groups.tolist() == [1, 0, 1, 0, 0]
    _, groups = by_sequence(prompts, "number", groups=np.array([7, 7, 5, -3, -3]))
    assert len(set(groups.tolist())) == 3
    assert groups[0] == groups[1] != groups[3] == groups[4]


def test_labels_by_position_of_a_store_of_slots(prompts: Store) -> None:
    """Entry by entry, that of its position."""
    labels = np.arange(5 * prompts.plan.context_length).reshape(5, -1) % 3
    found = labels_of(prompts, labels, None, are_classes=True).values.reshape(prompts.shape)
    used, positions = prompts.entries.in_use(slice(None)), prompts.entries.positions(slice(None))
    for sequence, entry in np.argwhere(used):
        assert found[sequence, entry] == labels[sequence, positions[sequence, entry]]


def test_document_of_several_sequences_is_one_group(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["word " * 40, "other " * 10, "third " * 30]))
    actstore.extract(
        model=str(MODEL_PATH),
        tokens=str(text),
        documents="paragraph",
        context_length=16,
        hooks=["blocks.0.hook_resid_post"],
        out=str(tmp_path / "store"),
    )
    store = actstore.open(str(tmp_path / "store"))
    labels = np.arange(store.shape[0] * 16).reshape(-1, 16) % 2
    groups = labels_of(store, labels, None, are_classes=True).groups.reshape(-1, 16)
    documents = store.documents[:]
    assert len(np.unique(documents[documents >= 0])) == 3
    for number in range(3):
        assert len(set(groups[documents == number].tolist())) == 1
    assert len(set(groups.reshape(-1).tolist())) == 3
    with pytest.raises(JobError, match="sequence 2 holds several documents, so it has no one label"):
        labels_of(store, np.arange(store.shape[0]) % 2, None, are_classes=True)


def test_arrays_without_labels_at_some_places(store: Store) -> None:
    for none in (-1, np.nan):
        given = np.array([0, 1, none, 1, 0, 1])
        values, groups = by_sequence(store, given)
        assert values.tolist() == [0, 1, -1, 1, 0, 1]
        assert groups.tolist() == [0, 1, -1, 2, 3, 4]
    values, _ = by_sequence(store, np.array(["a", None, "b", "b", "a", "a"], object))
    assert values.tolist() == [0, -1, 1, 1, 0, 0]


def test_class_that_no_row_has_is_no_class(store: Store) -> None:
    labels = labels_of(store, np.array([5, 9, 9, 5, 5, 5]), None, are_classes=True)
    assert labels.classes == (5, 9)
    some = np.ones(N * WIDTH, bool)
    some[WIDTH : 2 * WIDTH] = False
    labels = labels_of(store, np.array([5, 2, 9, 5, 9, 5]), None, are_classes=True).only(some)
    assert labels.classes == (5, 9)
    assert labels.values.reshape(N, WIDTH)[:, 0].tolist() == [0, -1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "are_classes", "says"),
    [
        (np.zeros(N - 1), True, r"labels have the shape \[5\]; give one for each sequence, \[6\]"),
        (np.zeros((N, 3)), True, r"or for each token, \[6, 8\]"),
        (
            np.zeros(N),
            True,
            r"all labels are 0; a probe needs labels of two classes or more, such as 0 and 1",
        ),
        (np.full(N, -1), True, "no row of the store has a label"),
        (np.full(N, np.nan), False, "no row of the store has a label"),
        (np.array([0.5, 1, 1, 0, 0, 0]), True, "labels hold 0.5, and classes are whole numbers"),
        (np.array([-2, 1, 1, 0, 0, 0]), True, "labels hold -2"),
        (np.array([np.inf, 1, 1, 0, 0, 0]), False, "labels hold infinity"),
        (np.array(["a"] * N), False, "labels are no numbers"),
        (np.array(["a", 1, 2, "b", 1, 2], object), True, "labels are of several types"),
        (np.zeros(N, complex), True, "labels are complex128"),
    ],
)
def test_labels_that_are_refused(store: Store, labels: Any, are_classes: bool, says: str) -> None:
    with pytest.raises(JobError, match=says):
        labels_of(store, labels, None, are_classes=are_classes)


def test_columns_that_are_refused(prompts: Store, store: Store) -> None:
    with pytest.raises(TokensError, match="keeps no column label; its columns are: kind, score"):
        labels_of(prompts, "label", None, are_classes=True)
    with pytest.raises(JobError, match="labels are no numbers"):
        labels_of(prompts, "kind", None, are_classes=False)
    with pytest.raises(JobError, match="choose kind: ridge"):
        labels_of(prompts, "score", None, are_classes=True)
    with pytest.raises(JobError, match=r"groups have the shape \[3\]"):
        labels_of(store, np.arange(N) % 2, np.arange(3), are_classes=True)


def test_dates_are_no_labels(tmp_path: Path) -> None:
    """As numbers, a missing date would be a class of its own."""
    table = pa.table({"text": ["To be", "or not"], "when": pa.array([datetime.date(1603, 1, 1), None])})
    out, hook = str(tmp_path / "dates"), "blocks.0.hook_resid_post"
    actstore.extract(
        model=str(MODEL_PATH), tokens=table, keep=["when"], hooks=hook, positions="last", out=out
    )
    with pytest.raises(JobError, match=r"^column when holds date32\[day\], which cannot be labels"):
        labels_of(actstore.open(out), "when", None, are_classes=True)
