"""Parquet and Arrow files compared with the values that were written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from actstore.errors import TokensError
from actstore.tokens import open_source

TEXTS: list[str | None] = ["one", "", None, "naïve 🦜", *(f"text {i}" for i in range(3000))]
IDS: list[list[int] | None] = [[1, 2, 3], [], None, [50_000], *([i, i + 1] for i in range(3000))]
TABLE = pa.table({"n": range(len(IDS)), "text": TEXTS, "ids": pa.array(IDS, pa.list_(pa.int64()))})


def write_ipc_file(table: Any, path: Path) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def write_ipc_stream(table: Any, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def write_parquet(table: Any, path: Path) -> None:
    pq.write_table(table, path, row_group_size=900)


def write_feather(table: Any, path: Path) -> None:
    feather.write_feather(table, path, compression="zstd")


FORMATS: dict[str, tuple[str, Callable[[Any, Path], None]]] = {
    "parquet": (".parquet", write_parquet),
    "arrow file": (".arrow", write_ipc_file),
    "arrow stream": (".arrow", write_ipc_stream),
    "feather": (".feather", write_feather),
}


def read(spec: str, column: str | None = None) -> list[Any]:
    """All documents, arrays as lists; their numbers must run from 0 on without gaps."""
    source = open_source(spec, column=column)
    documents: list[Any] = []
    for first, batch in source.batches():
        assert first == len(documents)
        for document in batch:
            if isinstance(document, str):
                assert source.kind == "text"
                documents.append(document)
            else:
                assert source.kind == "tokens"
                assert isinstance(document, np.ndarray)
                assert document.dtype == np.int32
                documents.append(document.tolist())
    return documents


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    suffix, write = FORMATS[name]
    write(TABLE, tmp_path / f"a{suffix}")
    assert read(f"{tmp_path}/a{suffix}") == [text or "" for text in TEXTS]
    assert read(f"{tmp_path}/a{suffix}", "text") == [text or "" for text in TEXTS]
    assert read(f"{tmp_path}/a{suffix}", "ids") == [ids or [] for ids in IDS]
    write(TABLE, tmp_path / f"b{suffix}")
    assert read(str(tmp_path), "ids") == 2 * [ids or [] for ids in IDS]
    fsspec.filesystem("memory").pipe(f"/tokens-table/a{suffix}", (tmp_path / f"a{suffix}").read_bytes())
    assert read(f"memory://tokens-table/a{suffix}", "ids") == [ids or [] for ids in IDS]


@pytest.mark.parametrize(
    "type_",
    [
        pa.list_(pa.int32()),
        pa.list_(pa.uint16()),
        pa.list_(pa.uint64()),
        pa.large_list(pa.int64()),
        pa.list_(pa.int64(), 2),
    ],
    ids=str,
)
def test_lists_of_any_integer_type(tmp_path: Path, type_: Any) -> None:
    write_ipc_file(pa.table({"tokens": pa.array([[1, 2], None, [3, 40_000]], type_)}), tmp_path / "a.arrow")
    assert read(f"{tmp_path}/a.arrow") == [[1, 2], [], [3, 40_000]]


@pytest.mark.parametrize(
    "type_", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_strings_of_any_type(tmp_path: Path, type_: Any) -> None:
    write_ipc_file(pa.table({"text": pa.array(["a", None, "b"], type_)}), tmp_path / "a.arrow")
    assert read(f"{tmp_path}/a.arrow") == ["a", "", "b"]


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"text": ["a", "b"], "input_ids": [[1], [2, 3]]})
    saved.save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved")) == [[1], [2, 3]]
    assert read(str(tmp_path / "saved"), "text") == ["a", "b"]


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"text": ["a"], "tokens": [[1]], "input_ids": [[2]]}, "input_ids"),
        ({"text": ["a"], "tokens": [[1]]}, "tokens"),
        ({"text": ["a"], "tokens": [["the", "words"]]}, "text"),
        ({"other": [[1]], "text": ["a"]}, "text"),
    ],
)
def test_the_column_chosen_by_default(tmp_path: Path, columns: dict[str, Any], chosen: str) -> None:
    write_parquet(pa.table(columns), tmp_path / "a.parquet")
    assert open_source(f"{tmp_path}/a.parquet").column == chosen


@pytest.mark.parametrize(
    ("columns", "column", "message"),
    [
        (
            {"body": ["a"], "n": [1]},
            None,
            r"a.parquet has no column input_ids or tokens .* its columns: body \(string\), n \(int64\)",
        ),
        ({"body": ["a"]}, "txt", r"a.parquet has no column txt; its columns are: body \(string\)"),
        (
            {"n": [1]},
            "n",
            r"column n of .*a.parquet holds neither strings nor lists of integers nor chats; .* n \(int64\)",
        ),
    ],
)
def test_a_missing_column_fails_on_opening(
    tmp_path: Path, columns: dict[str, Any], column: str | None, message: str
) -> None:
    write_parquet(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(TokensError, match=message):
        open_source(f"{tmp_path}/a.parquet", column=column)


def test_a_later_file_that_differs_is_named(tmp_path: Path) -> None:
    write_parquet(pa.table({"x": ["a"]}), tmp_path / "a.parquet")
    write_parquet(pa.table({"y": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(TokensError, match=r"b.parquet has no column x; its columns are: y"):
        read(str(tmp_path), "x")
    write_parquet(pa.table({"x": [[1]]}), tmp_path / "b.parquet")
    with pytest.raises(TokensError, match=r"column x holds text in .*a.parquet but tokens in .*b.parquet"):
        read(str(tmp_path), "x")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("data", [b"", b"no table at all", b"ARROW1 no table"])
def test_a_file_that_is_no_table_fails_on_opening(tmp_path: Path, suffix: str, data: bytes) -> None:
    (tmp_path / f"a{suffix}").write_bytes(data)
    with pytest.raises(TokensError, match=f"a{suffix} cannot be read: ") as caught:
        open_source(f"{tmp_path}/a{suffix}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [[1], [], [2, 2**31]],
            "row 2002 of .* has the token id 2147483648, but token ids are 0 to 2147483647",
        ),
        ([[1], [-1]], "row 2001 of .* has the token id -1"),
        ([[1], [], [2, None]], "row 2002 of .* has a null among its token ids"),
    ],
)
def test_ids_that_are_none_are_named_by_row(tmp_path: Path, ids: Any, message: str) -> None:
    write_parquet(pa.table({"tokens": [[7]] * 2000 + ids}), tmp_path / "a.parquet")
    with pytest.raises(TokensError, match=message):
        read(f"{tmp_path}/a.parquet")


def test_a_string_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    bad = pa.array([b"a\xff"], pa.binary()).view(pa.string())
    write_ipc_file(pa.table({"text": bad}), tmp_path / "a.arrow")
    with pytest.raises(TokensError, match=r"a.arrow holds a string that is not UTF-8"):
        read(f"{tmp_path}/a.arrow")


def test_an_empty_table_has_no_documents(tmp_path: Path) -> None:
    write_parquet(TABLE.slice(0, 0), tmp_path / "a.parquet")
    assert read(f"{tmp_path}/a.parquet") == []


def doubled(path: Path, *, is_text: bool = True, other: bool = False) -> Path:
    """A table with two columns of one name: the column that is read, or another one."""
    values = pa.array(["a"]) if is_text else pa.array([[1]])
    names = ["text", "other", "other"] if other else ["text", "text", "other"]
    table = pa.Table.from_arrays([values, values, values], names=names)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize("column", ["text", None])
def test_two_columns_of_one_name(tmp_path: Path, suffix: str, is_text: bool, column: str | None) -> None:
    path = doubled(tmp_path / f"a.{suffix}", is_text=is_text)
    if column is None and not is_text:
        return  # the column that is read has a unique name
    with pytest.raises(TokensError, match=r"has 2 columns named text; give each a name of its own"):
        open_source(str(path), column=column)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_two_other_columns_of_one_name_do_not_matter(tmp_path: Path, suffix: str) -> None:
    path = doubled(tmp_path / f"a.{suffix}", other=True)
    ((_, texts),) = open_source(str(path)).batches()
    assert texts == ["a"]


def test_later_file_with_two_columns_of_one_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    doubled(tmp_path / "b.parquet")
    with pytest.raises(TokensError, match=r"b\.parquet has 2 columns named text"):
        list(open_source(str(tmp_path)).batches())


def test_column_whose_name_is_a_path_into_another(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a.text": ["flat"], "a": [{"text": "nested"}]}), path)
    ((_, texts),) = open_source(str(path), column="a.text").batches()
    assert texts == ["flat"]
