"""Kept rows come back as they were given, in tables of bounded size."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actstore.errors import TokensError
from actstore.tokens.keeping import kept_rows
from actstore.tokens.keeping.kept_rows import KeptRows


def rows_of(kept: KeptRows) -> list[dict[str, Any]]:
    return [row for table in kept.tables() for row in table.to_pylist()]


def test_records_come_back_as_far_as_they_were_used(tmp_path: Path) -> None:
    records = [{"n": i if i < 2000 else i + 0.5, "id": f"d{i}", "other": i} for i in range(3000)]
    del records[7]["n"]
    kept = KeptRows(["id", "n"], tmp_path)
    for number, record in enumerate(records):
        kept.add_record(record, f"line {number}")
    kept.finish(2500)
    assert kept.schema == pa.table({"id": ["a"], "n": [0.5]}).schema
    (table,) = kept.tables()
    assert table.schema == kept.schema
    assert table.to_pylist() == [{"id": r["id"], "n": r.get("n")} for r in records[:2500]]
    assert rows_of(kept) == table.to_pylist()  # as often as wanted


def test_rows_in_any_pieces_make_the_same_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_rows, "TABLE_ROWS", 100)
    whole = pa.record_batch({"a": pa.array(range(1050)), "b": pa.array([None, "x", "yy"] * 350)})
    at = 0
    kept = KeptRows(["b", "a"], tmp_path)
    rng = random.Random(0)
    while at < whole.num_rows:
        n = rng.randrange(1, 300)
        kept.add_rows(whole.slice(at, n))
        at += n
    kept.finish(1001)
    tables = list(kept.tables())
    assert [table.num_rows for table in tables] == [100] * 10 + [1]
    expected = pa.Table.from_batches([whole]).select(["b", "a"]).slice(0, 1001)
    assert pa.concat_tables(tables).combine_chunks() == expected.combine_chunks()


def test_tables_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 4096
    monkeypatch.setattr(kept_rows, "TABLE_NBYTES", most)
    texts = ["x" * (37 * i % 900) for i in range(400)]
    kept = KeptRows(["text"], tmp_path)
    kept.add_rows(pa.record_batch({"text": texts}))
    kept.finish(len(texts))
    tables = list(kept.tables())
    assert len(tables) > 10
    assert max(table.nbytes for table in tables) <= 2 * most
    assert rows_of(kept) == [{"text": text} for text in texts]
    with pytest.raises(TokensError, match=r"text have 5,0\d\d bytes in one row, and 4,096 are the most"):
        KeptRows(["text"], tmp_path / "more").add_rows(pa.record_batch({"text": ["a", "x" * 5000]}))


def test_no_rows_are_one_empty_table(tmp_path: Path) -> None:
    kept = KeptRows(["a"], tmp_path)
    kept.finish(0)
    (table,) = kept.tables()
    assert (table.num_rows, table.schema.names) == (0, ["a"])


def test_encodings_are_no_types(tmp_path: Path) -> None:
    kept = KeptRows(["a", "b"], tmp_path)
    words = pa.array(["x", None, "x"])
    for encoded in (words.dictionary_encode(), words, words.cast(pa.string_view())):
        kept.add_rows(pa.record_batch({"a": encoded, "b": pa.array([[1], [], None], pa.list_(pa.int8()))}))
    kept.finish(9)
    (table,) = kept.tables()
    assert table.schema == pa.schema([("a", pa.string()), ("b", pa.list_(pa.int8()))])
    assert table["a"].to_pylist() == ["x", None, "x"] * 3


def test_nulls_get_the_type_of_what_comes_later(tmp_path: Path) -> None:
    kept = KeptRows(["a"], tmp_path)
    kept.add_rows(pa.record_batch({"a": pa.nulls(3)}))
    kept.add_rows(pa.record_batch({"a": pa.array([1], pa.int16())}))
    kept.add_rows(pa.record_batch({"a": pa.nulls(2)}))
    kept.finish(6)
    (table,) = kept.tables()
    assert table["a"].to_pylist() == [None, None, None, 1, None, None]
    assert table.schema.field("a").type == pa.int16()


@pytest.mark.parametrize("n", [2, 3000], ids=["in one piece", "in several"])
def test_whole_numbers_that_a_float_cannot_hold_are_refused(tmp_path: Path, n: int) -> None:
    def keep() -> list[pa.Table]:
        kept = KeptRows(["a"], tmp_path)
        for number in range(n):
            kept.add_record({"a": 0.5 if number == n - 1 else 2**53 + 1}, f"line {number}")
        kept.finish(n)
        return list(kept.tables())

    with pytest.raises(TokensError, match="column a cannot be kept as double"):
        keep()
