"""Columns of the source come with the store, whatever happens on the way."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import actstore
from actstore.errors import PlanMismatchError, StorageError, TokensError
from actstore.extraction.planning.tokenising import source_files
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import columns_key, tokens_key
from actstore.tokens.keeping import kept_rows
from tests.store.runs import bytes_below

Fields = dict[str, Any]
Row = dict[str, Any]
RUN = "0000"
SUMMARY = ("manifest.json", "shards.parquet", "statistics.json", "tokens.json")
"""How the keys end of what a run writes behind its tables, beside commit records."""


def rows(n: int, first: int = 0) -> list[Row]:
    """Documents of ids of different lengths, some of them empty, with labels."""
    return [
        {
            "input_ids": [] if i % 6 == 4 else [2 + (i * 7 + j) % 200 for j in range(3 + i % 11)],
            "label": None if i % 9 == 5 else i % 3,
            "id": f"d{i}",
            "tags": ["x"] * (i % 3),
        }
        for i in range(first, first + n)
    ]


def write(path: Path, given: list[Row]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(given), path, row_group_size=13)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(path)


@pytest.fixture
def job(fields: Fields, tmp_path: Path) -> Fields:
    """One document a sequence of 16 tokens, from 60 documents."""
    kept = {name: fields[name] for name in ("model", "out")}
    return kept | {
        "tokens": write(tmp_path / "text.jsonl", rows(60)),
        "hooks": ["blocks.0.hook_resid_post"],
        "context_length": 16,
        "batch_size": 4,
        "packing": "document",
        "keep": ["label", "id", "tags"],
    }


def columns(given: list[Row], *names: str) -> list[Row]:
    return [{name: row[name] for name in names} for row in given]


def check_documents(store: actstore.Store, given: list[Row]) -> None:
    """Check that each token has the row whose ids hold it."""
    there = store.rows.to_pylist()
    numbers, offsets, tokens = store.document_rows(), store.offsets[:], store.tokens[:]
    assert numbers.shape == tokens.shape
    by_id = {row["id"]: row["input_ids"] for row in given}
    for sequence, position in np.argwhere(numbers >= 0):
        row = there[numbers[sequence, position]]
        assert by_id[row["id"]][offsets[sequence, position]] == tokens[sequence, position]
    assert ((numbers >= 0) == (offsets >= 0)).all()


CHANGES: dict[str, tuple[str, str]] = {
    "a label": ('"label": 1, "id": "d1"', '"label": 2, "id": "d1"'),
    "an id": ('"id": "d7"', '"id": "e7"'),
    "a token of an empty document": ('"tags": []', '"tags":[] '),
    "a token": ('"input_ids": [2, 3, 4]', '"input_ids": [2, 3, 5]'),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_file_that_was_changed_in_place_is_another(
    job: Fields, tmp_path: Path, change: str, suffix: str
) -> None:
    """Its name and its size are the same as before, and the store has what was in it when it was planned."""
    path = tmp_path / f"source{suffix}"

    def put(text: str) -> None:
        # Stored blocks, so that the size is that of the text.
        path.write_bytes(gzip.compress(text.encode(), 0, mtime=0) if suffix.endswith("gz") else text.encode())

    text = Path(job["tokens"]).read_text()
    put(text)
    planned = actstore.plan(**job | {"tokens": str(path)})
    nbytes = path.stat().st_size
    changed = text.replace(*CHANGES[change], 1)
    assert changed != text
    put(changed)
    assert path.stat().st_size == nbytes
    actstore.extract(planned)
    store = actstore.open(job["out"])
    check_documents(store, rows(60))
    assert store.rows.to_pylist() == columns(rows(60), "label", "id", "tags")
    message = rf"tokens\.files is source{suffix} \({nbytes} bytes, CRC-32C \w{{8}}\) in the store, source"
    with pytest.raises(PlanMismatchError, match=message):
        actstore.plan(**job | {"tokens": str(path)})
    with pytest.raises(PlanMismatchError, match="its files have changed, or are not the first ones"):
        actstore.plan(**job | {"tokens": str(path), "append": True})
    put(text)
    assert actstore.plan(**job | {"tokens": str(path)}).is_finished


@pytest.mark.parametrize("first", [0, source_files.MAX_CHECKED])
def test_stores_without_checksums_of_files_are_gone_on_with(
    job: Fields, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Earlier versions have none, nor have sources that are large, to which one can become by files at its end."""
    monkeypatch.setattr(source_files, "MAX_CHECKED", first)
    actstore.extract(**job)
    (file,) = actstore.open(job["out"]).plan.request.tokens.files
    assert (file.crc32c is None) == (first == 0)
    monkeypatch.setattr(source_files, "MAX_CHECKED", 1 << 20 if first == 0 else 0)
    assert actstore.plan(**job).is_finished


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("seed", [None, 5])
def test_rows_are_those_of_the_source(job: Fields, tmp_path: Path, suffix: str, seed: int | None) -> None:
    source = write(tmp_path / f"source{suffix}", rows(60))
    actstore.extract(actstore.plan(**job | {"tokens": source, "seed": seed}))
    store = actstore.open(job["out"])
    assert store.columns == ("label", "id", "tags")
    assert store.rows.to_pylist() == columns(rows(60), "label", "id", "tags")
    assert store.column("tags").to_pylist() == [row["tags"] for row in rows(60)]
    check_documents(store, rows(60))
    # One document a sequence: labels by sequence are those of the documents that are not empty, as they were shuffled.
    used = [row for row in rows(60) if row["input_ids"]]
    order = (
        range(len(used))
        if seed is None
        else np.random.Generator(np.random.PCG64(seed)).permutation(len(used))
    )
    expected = [used[i]["label"] for i in order]
    assert store.per_sequence("label").to_pylist() == expected
    assert store.per_sequence("label", slice(20, 3, -4)).to_pylist() == expected[20:3:-4]
    assert store.per_sequence("label", [7, 0, 7]).to_pylist() == [expected[i] for i in (7, 0, 7)]
    assert actstore.verify(job["out"]).findings == ()
    with pytest.raises(TokensError, match=r"keeps no column lable; its columns are: label, id, tags$"):
        store.column("lable")


def test_all_documents_have_a_row_up_to_the_last_that_was_read(job: Fields) -> None:
    actstore.extract(actstore.plan(**job | {"max_tokens": 16 * 20}))
    store = actstore.open(job["out"])
    last = int(store.documents[:].max())
    assert store.rows["id"].to_pylist() == [f"d{i}" for i in range(last + 1)]
    assert last == [i for i, row in enumerate(rows(60)) if row["input_ids"]][19]


def test_sequences_of_several_documents_have_no_one_value(job: Fields) -> None:
    actstore.extract(actstore.plan(**job | {"packing": "concat"}))
    store = actstore.open(job["out"])
    assert store.rows.num_rows == 60
    check_documents(store, rows(60))
    with pytest.raises(TokensError, match="several documents .*, so label has no one value for each"):
        store.per_sequence("label")


def test_a_store_without_columns_says_so(job: Fields) -> None:
    actstore.extract(actstore.plan(**job | {"keep": None}))
    store = actstore.open(job["out"])
    assert store.columns == ()
    assert (store.document_rows() == -1).all()
    with pytest.raises(TokensError, match=r"keeps no columns of its source; name them as keep \(--keep\)"):
        _ = store.rows
    assert "keep" not in Path(job["out"], "_actstore/runs/0000/plan.json").read_text()
    assert "tables" not in Path(job["out"], "_actstore/runs/0000/tokens.json").read_text()


def test_many_tables(job: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_rows, "TABLE_ROWS", 25)
    actstore.extract(actstore.plan(**job))
    store = actstore.open(job["out"])
    assert store.blobs.head(columns_key(RUN, 2)) is not None
    assert store.rows.to_pylist() == columns(rows(60), "label", "id", "tags")
    assert actstore.verify(job["out"]).findings == ()


def test_another_keep_is_another_plan(job: Fields) -> None:
    actstore.extract(actstore.plan(**job))
    assert not actstore.plan(**job | {"keep": "label, id,tags"}).pending
    for keep, asked in ((None, "none"), ("id,label,tags", "id, label, tags")):
        with pytest.raises(
            PlanMismatchError, match=rf"tokens.keep is label, id, tags in the store, {asked} was asked for"
        ):
            actstore.plan(**job | {"keep": keep})
    added = actstore.plan(**job | {"hooks": "blocks.1.hook_resid_post"})
    actstore.extract(added)
    assert added.plan.run == "0001"
    assert actstore.open(job["out"]).rows.num_rows == 60


@pytest.mark.parametrize("written", [0, 1, 2, 3, "record"])
def test_an_interrupted_run_ends_in_the_same_bytes(
    job: Fields, monkeypatch: pytest.MonkeyPatch, written: int | str
) -> None:
    monkeypatch.setattr(kept_rows, "TABLE_ROWS", 25)
    actstore.extract(actstore.plan(**job))
    blobs = LocalBlobs(Path(job["out"]))
    whole = bytes_below(blobs)
    # What a run has written that was killed behind so many tables.
    for key in whole:
        if "/commits/" in key or key.endswith(("manifest.json", "shards.parquet", "statistics.json")):
            blobs.delete(key)
    if written != "record":
        blobs.delete(tokens_key(RUN))
        for number in range(int(written), 3):
            blobs.delete(columns_key(RUN, number))
    actstore.extract(actstore.plan(**job))
    assert bytes_below(blobs) == whole


def test_other_labels_than_an_earlier_attempt_wrote_are_refused(
    job: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a source that is too large to be compared before it is read."""
    monkeypatch.setattr(source_files, "MAX_CHECKED", 0)
    actstore.extract(actstore.plan(**job))
    blobs = LocalBlobs(Path(job["out"]))
    for key in bytes_below(blobs):
        if "/commits/" in key or key.endswith(SUMMARY):
            blobs.delete(key)
    changed = Path(job["tokens"]).read_text().replace('"label": 2', '"label": 1')
    (tmp_path / "text.jsonl").write_text(changed)
    message = f"{columns_key(RUN, 0)} holds other rows than the source gives now; .* --repair`"
    with pytest.raises(StorageError, match=message):
        actstore.extract(actstore.plan(**job))
    actstore.verify(job["out"], repair=True)
    actstore.extract(actstore.plan(**job))
    assert 2 not in actstore.open(job["out"]).column("label").to_pylist()
    assert actstore.verify(job["out"]).findings == ()


def test_a_table_of_another_pyarrow_is_adopted(job: Fields) -> None:
    actstore.extract(actstore.plan(**job))
    blobs = LocalBlobs(Path(job["out"]))
    for key in bytes_below(blobs):
        if "/commits/" in key or key.endswith(SUMMARY):
            blobs.delete(key)
    path = blobs.path(columns_key(RUN, 0))
    table = pq.read_table(path)
    path.unlink()
    pq.write_table(table, path, compression="gzip", use_dictionary=False)
    theirs = path.read_bytes()
    actstore.extract(actstore.plan(**job))
    assert path.read_bytes() == theirs
    assert actstore.verify(job["out"]).findings == ()
    assert actstore.open(job["out"]).rows.to_pylist() == columns(rows(60), "label", "id", "tags")


def test_a_damaged_table_is_made_again_from_the_source(job: Fields) -> None:
    actstore.extract(actstore.plan(**job))
    blobs = LocalBlobs(Path(job["out"]))
    whole = bytes_below(blobs)
    path = blobs.path(columns_key(RUN, 0))
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    (finding,) = actstore.verify(job["out"]).findings
    assert (finding.key, finding.problem[:11]) == (columns_key(RUN, 0), "has crc32c ")
    actstore.verify(job["out"], repair=True)
    report = actstore.extract(actstore.plan(**job))
    assert report.n_tokens_computed == 0
    assert bytes_below(blobs) == whole


def test_parts_follow_each_other(job: Fields, tmp_path: Path) -> None:
    more = [row | {"extra": row["id"].upper()} for row in rows(30, 100)]
    third = rows(9, 200)
    parts = (
        ("text.jsonl", rows(60), "label,id"),
        ("b.jsonl", more, "id,extra,label"),
        ("c.jsonl", third, None),
    )
    for number, (name, given, keep) in enumerate(parts):
        source = write(tmp_path / name, given)
        actstore.extract(actstore.plan(**job | {"tokens": source, "keep": keep, "append": number > 0}))
    store = actstore.open(job["out"])
    assert store.columns == ("label", "id", "extra")
    expected = [row | {"extra": None} for row in rows(60)] + more
    assert store.rows.to_pylist() == columns(expected, "label", "id", "extra")
    assert store.column("extra").to_pylist() == [row["extra"] for row in expected]
    used = [row for row in expected if row["input_ids"]]
    n_third = sum(bool(row["input_ids"]) for row in third)
    assert store.per_sequence("id").to_pylist() == [row["id"] for row in used] + [None] * n_third
    assert (store.document_rows()[len(used) :] == -1).all()
    numbers = store.document_rows(slice(0, len(used))).max(axis=1)
    assert [store.rows["id"][int(number)].as_py() for number in numbers] == [row["id"] for row in used]
    assert actstore.verify(job["out"]).findings == ()


def test_more_of_the_same_text_has_the_rows_from_its_beginning(job: Fields) -> None:
    for n, append in ((20, False), (35, True)):
        actstore.extract(actstore.plan(**job | {"max_tokens": 16 * n, "append": append}))
    store = actstore.open(job["out"])
    used = [row["id"] for row in rows(60) if row["input_ids"]][:35]
    assert store.per_sequence("id").to_pylist() == used
    check_documents(store, rows(60))
    n_first, n_second = int(used[19][1:]) + 1, int(used[34][1:]) + 1
    assert store.rows["id"].to_pylist() == [f"d{i}" for i in (*range(n_first), *range(n_second))]


def test_a_part_with_another_type_is_refused(job: Fields, tmp_path: Path) -> None:
    actstore.extract(actstore.plan(**job))
    other = write(tmp_path / "b.jsonl", [row | {"label": "yes"} for row in rows(9)])
    with pytest.raises(
        PlanMismatchError, match=r"column label is int64 in the store at .* and string in .*b.jsonl"
    ):
        actstore.plan(**job | {"tokens": other, "append": True})
    nulls = write(tmp_path / "c.jsonl", [row | {"label": None} for row in rows(9)])
    actstore.extract(actstore.plan(**job | {"tokens": nulls, "append": True}))
    assert (
        actstore.open(job["out"]).column("label").to_pylist()
        == [row["label"] for row in rows(60)] + [None] * 9
    )


def test_a_type_that_parquet_lacks_is_refused(job: Fields, tmp_path: Path) -> None:
    source = write(tmp_path / "b.jsonl", [row | {"tags": {}} for row in rows(9)])
    with pytest.raises(
        TokensError, match="column tags is struct<>, which Parquet files cannot hold; leave it out"
    ):
        actstore.plan(**job | {"tokens": source})


def test_the_space_on_disk_counts_the_columns(job: Fields) -> None:
    with_columns, without = (actstore.plan(**job | {"keep": keep}).nbytes_to_write for keep in ("id", None))
    assert with_columns > without
