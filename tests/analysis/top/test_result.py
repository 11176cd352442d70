"""Tables and pages of top rows."""

import re
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import actstore
from actstore.analysis import TopActivations, top_activations
from actstore.errors import JobError, StorageError, TokensError
from tests.analysis.stores import HOOK, SHAKESPEARE_HOOK, D, shakespeare, store_of


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> TopActivations:
    return top_activations(shakespeare(tmp_path_factory.mktemp("result")), SHAKESPEARE_HOOK, [3, 8], 6)


def test_table_is_that_of_the_contexts(top: TopActivations) -> None:
    table = top.to_arrow(before=4, after=2)
    assert table.column_names == [
        *("feature", "rank", "value", "sequence", "position", "document", "token_id", "context_ids", "at"),
        *("token", "context"),
    ]
    for row in table.to_pylist():
        context = top.context(row["feature"], row["rank"], before=4, after=2)
        assert (tuple(row["context"]), row["at"], row["value"]) == (context.tokens, context.at, context.value)
        assert row["token"] == context.tokens[context.at]
    assert len(table) == 12
    frame = top.to_pandas(before=4, after=2)
    assert frame["token"].tolist() == table["token"].to_pylist()


def test_empty_places_are_in_no_table(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((5, 8, D)).astype(np.float32)
    values[..., 1] = -1
    values[3, 2, 1] = 5
    top = top_activations(store_of(tmp_path, values), HOOK, [1, 2], 4, above=0)
    table = top.to_arrow(text=False, before=1, after=0)
    assert table["feature"].to_pylist() == [0, 1, 1, 1, 1]
    assert table.slice(0, 1).to_pylist()[0] == {
        "feature": 0,
        "rank": 0,
        "value": 5.0,
        "sequence": 3,
        "position": 2,
        "document": None,  # the example says that packing put it in
        "token_id": 26,
        "context_ids": [25, 26],
        "at": 1,
    }


def test_file_is_whole_or_not_there(top: TopActivations, tmp_path: Path) -> None:
    top.to_parquet(tmp_path / "top.parquet", text=False)
    assert pq.read_table(tmp_path / "top.parquet").equals(top.to_arrow(text=False))
    assert [path.name for path in tmp_path.iterdir()] == ["top.parquet"]
    with pytest.raises(StorageError, match="cannot be written"):
        top.to_parquet(tmp_path / "no" / "top.parquet")


def test_windows_below_nothing(top: TopActivations) -> None:
    with pytest.raises(JobError, match="before is -1"):
        top.to_arrow(before=-1)
    with pytest.raises(JobError, match="after is -2"):
        top.context(0, 0, after=-2)


def test_page_marks_the_token_of_each_row(top: TopActivations) -> None:
    page = top._repr_html_()
    marked = [unescape(token) for token in re.findall(r"<b style='[^']*'>(.*?)</b>", page)]
    assert marked == [str(token).replace("\n", "↵") for token in top.to_arrow()["token"].to_pylist()]
    shown = [
        float(value) for value in re.findall(r"<td>(-?[\d.e+-]+)</td><td>\d+</td><td>\d+</td><td style", page)
    ]
    np.testing.assert_allclose(shown, top.values.reshape(-1), rtol=1e-3)
    assert "<script" not in page


def test_page_of_a_store_without_text(tmp_path: Path) -> None:
    store = store_of(tmp_path, np.ones((5, 8, D), np.float32))
    top = top_activations(store, HOOK, [1], 2)
    with pytest.raises(TokensError):
        top.to_arrow()
    assert "has tokens without a text" in top._repr_html_()


def test_text_of_the_source_is_no_markup(top: TopActivations) -> None:
    class Evil(dict[int, str]):
        def __missing__(self, key: int) -> str:
            return "<script>"

    from actstore.analysis.top import page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "TokenTexts", lambda store: Evil())
        assert "<script" not in top._repr_html_()
    assert isinstance(top.store, actstore.Store)
