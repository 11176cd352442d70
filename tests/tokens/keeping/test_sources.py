"""Every source with columns gives those to keep, row for row beside its documents."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from actstore.errors import TokensError
from actstore.tokens import KeptRows, Source, chats_of, open_source
from actstore.tokens.hub import HubSource

N = 5000
ROWS: list[dict[str, Any]] = [
    {
        "text": "" if i % 5 == 2 else f"document {i}",
        "label": None if i % 7 == 3 else i % 2,
        "id": f"d{i}",
        "scores": [i / 2] * (i % 3),
        "meta": {"a": i, "b": None if i % 2 else "x"},
    }
    for i in range(N)
]
KEEP = ("id", "label", "meta", "scores", "text")


def write_jsonl(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_gz(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)


def write_feather(rows: list[dict[str, Any]], path: Path) -> None:
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), str(path), chunksize=900)


WRITERS: dict[str, Callable[[list[dict[str, Any]], Path], None]] = {
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_gz,
    ".parquet": write_parquet,
    ".arrow": write_feather,
}


@pytest.fixture
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not below that of the source."""
    return tmp_path_factory.mktemp("spool")


def kept_of(source: Source, folder: Path) -> list[dict[str, Any]]:
    """All kept rows; the documents are checked against `ROWS`."""
    kept = KeptRows(source.keep, folder)
    n = 0
    for first, documents in source.batches(kept):
        assert first == n
        for text in documents:
            assert text == ROWS[n % N]["text"]
            n += 1
    kept.finish(n)
    return [row for table in kept.tables() for row in table.to_pylist()]


def expected(keep: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in keep} for row in ROWS]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("keep", [KEEP, ("label",), ("text",)], ids=",".join)
def test_files(tmp_path: Path, spool: Path, suffix: str, keep: tuple[str, ...]) -> None:
    WRITERS[suffix](ROWS[:1700], tmp_path / f"a{suffix}")
    WRITERS[suffix](ROWS[1700:], tmp_path / f"b{suffix}")
    source = open_source(str(tmp_path), keep=keep)
    assert kept_of(source, spool) == expected(keep)
    assert [first for first, _ in source.batches()][:1] == [0]  # without rows, as before


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_of_chats(tmp_path: Path, spool: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"turn {i}"}] if i % 5 else [], "id": i}
        for i in range(1700)
    ]
    WRITERS[suffix](rows[:900], tmp_path / f"a{suffix}")
    WRITERS[suffix](rows[900:], tmp_path / f"b{suffix}")
    check_chats(open_source(str(tmp_path), keep=("messages", "id")), spool, rows)


@pytest.mark.parametrize("has_features", [True, False])
def test_hub_chats(tmp_path: Path, has_features: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"turn {i}"}] if i % 5 else [], "id": i}
        for i in range(1700)
    ]
    dataset = (
        datasets.Dataset.from_list(rows).to_iterable_dataset()
        if has_features
        else datasets.IterableDataset.from_generator(lambda: iter(rows))
    )
    check_chats(HubSource(dataset, "hf:a/b", None, ("messages", "id")), tmp_path, rows)


def check_chats(source: Source, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Check that chats and kept rows are those that were written, row for row."""
    kept = KeptRows(source.keep, folder)
    chats = [list(chat.messages) for _, batch in chats_of(source, kept) for chat in batch]
    kept.finish(len(chats))
    assert chats == [row["messages"] for row in rows]
    assert [row for table in kept.tables() for row in table.to_pylist()] == rows


def features() -> datasets.Features:
    return datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "id": datasets.Value("string"),
            "scores": datasets.List(datasets.Value("float64")),
            "meta": {"a": datasets.Value("int64"), "b": datasets.Value("string")},
        }
    )


@pytest.mark.parametrize("has_features", [True, False])
def test_hub(tmp_path: Path, has_features: bool) -> None:
    def generate() -> Iterator[dict[str, Any]]:
        yield from ROWS

    dataset = (
        datasets.Dataset.from_list(ROWS, features=features()).to_iterable_dataset()
        if has_features
        else datasets.IterableDataset.from_generator(generate)
    )
    assert (dataset.features is not None) == has_features
    source = HubSource(dataset, "hf:a/b", "text", KEEP)
    assert kept_of(source, tmp_path) == expected(KEEP)


@pytest.mark.parametrize("has_features", [True, False])
def test_hub_without_the_column(has_features: bool) -> None:
    dataset = datasets.IterableDataset.from_generator(
        lambda: iter(ROWS[:3]), features=features() if has_features else None
    )
    with pytest.raises(TokensError, match="hf:a/b has no column lable; its columns are: text, label"):
        HubSource(dataset, "hf:a/b", "text", ("id", "lable"))


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_column_that_is_not_there(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](ROWS[:3], tmp_path / f"a{suffix}")
    with pytest.raises(TokensError, match=f"a{suffix} has no column lable; its columns are: text, label"):
        open_source(str(tmp_path), keep=("lable",))


def test_plain_text_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(TokensError, match=r"the columns label are to be kept .*, but .*a.txt is plain text"):
        open_source(str(tmp_path), keep=("label",))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_types_that_change_between_files(tmp_path: Path, spool: Path, suffix: str) -> None:
    for name, label in (("a", 1), ("b", None), ("c", 0.5)):
        WRITERS[suffix]([{"text": "x", "label": label}], tmp_path / f"{name}{suffix}")
    source = open_source(str(tmp_path), keep=("label",))
    with pytest.raises(
        TokensError, match=rf"column label, .*, is int64 in .*a{suffix} and double in .*c{suffix}"
    ):
        list(source.batches(KeptRows(("label",), spool)))
    (tmp_path / f"c{suffix}").unlink()
    kept = KeptRows(("label",), spool)
    assert sum(len(batch) for _, batch in open_source(str(tmp_path), keep=("label",)).batches(kept)) == 2
    kept.finish(2)
    assert [table["label"].to_pylist() for table in kept.tables()] == [[1, None]]


def test_types_that_change_between_lines(tmp_path: Path, spool: Path) -> None:
    write_jsonl([{"text": "x", "label": 1}], tmp_path / "a.jsonl")
    write_jsonl([{"text": "x", "label": "yes"}], tmp_path / "b.jsonl")
    source = open_source(str(tmp_path), keep=("label",))
    with pytest.raises(
        TokensError, match=r"label in line 1 of .*b.jsonl is a string, and .* before are a number"
    ):
        list(source.batches(KeptRows(("label",), spool)))


def test_a_repeated_key(tmp_path: Path, spool: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1, "label": 2}\n')
    with pytest.raises(TokensError, match=r"line 1 of .*a.jsonl has the key label more than once"):
        list(open_source(str(tmp_path), keep=("label",)).batches(KeptRows(("label",), spool)))
    assert len(list(open_source(str(tmp_path)).batches())) == 1
