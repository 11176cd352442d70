"""Tables of kept columns: equal rows are equal bytes, types stay, and hostile files take no memory."""

import datetime
import decimal
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actstore.errors import StorageError
from actstore.store.format import kept_table
from actstore.store.format.kept_table import decode_table, encode_table, is_table

COLUMNS: dict[str, "pa.Array[Any]"] = {
    "int64": pa.array([1, None, -(2**63)]),
    "uint8": pa.array([0, 255, None], pa.uint8()),
    "float64": pa.array([1.5, math.nan, None]),
    "float16": pa.array(np.array([1, 2, 3], np.float16)),
    "bool": pa.array([True, None, False]),
    "string": pa.array(["a", None, "ä" * 50]),
    "large_string": pa.array(["a", "", None], pa.large_string()),
    "binary": pa.array([b"\0", None, b""]),
    "null": pa.nulls(3),
    "date": pa.array([datetime.date(2020, 1, i) for i in (1, 2, 3)]),
    "timestamp": pa.array([1, None, 3], pa.timestamp("ns", "UTC")),
    "duration": pa.array([1, None, 3], pa.duration("s")),
    "decimal": pa.array([decimal.Decimal("1.23"), None, None]),
    "list": pa.array([[1.5, math.nan, None], None, []]),
    "fixed list": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int8(), 2)),
    "struct": pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}]),
    "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int32())),
}


def same(left: Any, right: Any) -> bool:
    """Whether values are the same; NaN is itself."""
    return repr(left.to_pylist()) == repr(right.to_pylist())


@pytest.mark.parametrize("name", COLUMNS)
def test_values_and_types_come_back(name: str) -> None:
    table = pa.table({"x": COLUMNS[name]})
    data = encode_table(table)
    there = decode_table(data, ["x"])
    assert there.schema == table.schema
    assert same(there["x"], table["x"])
    # Another program reads it, too.
    assert same(pq.read_table(io.BytesIO(data))["x"], table["x"])


def test_equal_rows_are_equal_bytes() -> None:
    pieces = [pa.table({"a": range(i, i + 10), "b": ["x"] * 10}) for i in range(0, 5000, 10)]
    whole = pa.concat_tables(pieces)
    assert encode_table(whole) == encode_table(whole.combine_chunks())


@pytest.mark.parametrize("name", COLUMNS)
def test_a_table_of_another_writer_holds_the_same_rows(name: str) -> None:
    table = pa.table({"x": COLUMNS[name]})
    own = encode_table(table)
    theirs = io.BytesIO()
    pq.write_table(table, theirs, compression="gzip", use_dictionary=False, data_page_version="2.0")
    assert theirs.getvalue() != own
    assert is_table(theirs.getvalue(), own, ["x"])
    fewer = encode_table(table.slice(0, 2))
    assert not is_table(fewer, own, ["x"])
    assert not is_table(own, own, ["y"])
    assert not is_table(own[:-1], own, ["x"])


def test_other_values_are_another_table() -> None:
    tables = [pa.table({"x": pa.array([value], pa.float64())}) for value in (math.nan, 1.0, None)]
    encoded = [encode_table(table) for table in tables]
    for i, data in enumerate(encoded):
        assert [is_table(data, own, ["x"]) for own in encoded] == [i == j for j in range(3)]


def test_only_the_columns_asked_for_are_read() -> None:
    data = encode_table(pa.table({"a": [1, 2], "b": ["x", "y"]}))
    assert decode_table(data, ["a", "b"], ["b"]).to_pydict() == {"b": ["x", "y"]}


def written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "no Parquet": (lambda: b"PAR1" * 10, "cannot be read as Parquet"),
    "empty": (lambda: b"", "cannot be read as Parquet"),
    "other columns": (lambda: written(pa.table({"b": [1]})), "does not have the columns that the plan keeps"),
    "dictionaries": (lambda: written(pa.table({"a": ["x" * 1000] * 1000})), "it has dictionaries"),
    "too many rows": (
        lambda: written(pa.table({"a": pa.nulls((1 << 20) + 1, pa.int8())}), use_dictionary=False),
        "it has not the 1048577 rows that it announces, or more than 1048576",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_writer_makes_is_refused(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(StorageError, match=message):
        decode_table(make(), ["a"])


def test_what_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_table(pa.table({"a": ["x" * 1000] * 1000}))
    assert len(data) < 10_000
    monkeypatch.setattr(kept_table, "_MAX_UNPACKED", 1 << 19)
    with pytest.raises(StorageError, match="it unpacks to more than 524288 bytes"):
        decode_table(data, ["a"])


@pytest.mark.parametrize("type_", [pa.struct([]), pa.month_day_nano_interval()], ids=str)
def test_types_that_parquet_lacks_are_refused(type_: Any) -> None:
    with pytest.raises(StorageError, match="columns x: "):
        encode_table(pa.schema([pa.field("x", type_)]).empty_table())
