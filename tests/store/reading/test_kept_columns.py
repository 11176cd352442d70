"""Kept columns are read from every storage, each table once for what is asked."""

import numpy as np
import pyarrow as pa
import pytest

import actstore
from actstore.errors import NotCommittedError, StorageError
from actstore.storage.blobs import Blobs
from actstore.store.reading.kept_columns import KeptColumns
from actstore.store.records.commit import TokensRecord, columns_key, tokens_key
from actstore.store.records.run import read_runs
from actstore.store.records.seal import seal
from tests.storage.watched import watched
from tests.store.example import example_plan, example_values, write_store
from tests.store.kept import KEEP, keeping, kept_table, name_tables, write_kept_store
from tests.store.runs import tokens_run, write_run
from tests.store.verifying.test_verify import overwrite

ALL = pa.concat_tables([kept_table(0, 100), kept_table(100, 40)])
TABLES = [columns_key("0000", 0), columns_key("0000", 1)]


@pytest.mark.parametrize("is_sealed", [True, False])
def test_columns_of_any_storage(blobs: Blobs, is_sealed: bool) -> None:
    write_kept_store(blobs)
    if is_sealed:
        seal(blobs)
    store = actstore.open(blobs.url)
    assert store.columns == KEEP
    assert store.rows == ALL
    assert store.column("label").to_pylist() == ALL["label"].to_pylist()
    assert (store.document_rows([0, 5]) == -1).all()  # packing put in all tokens of this store


def test_nothing_is_read_twice(blobs: Blobs) -> None:
    write_kept_store(blobs)
    seen = watched(blobs)
    kept = KeptColumns(seen, read_runs(blobs))
    assert kept.names == KEEP
    assert seen.calls == []
    kept.columns(["label"])
    assert [key for key in seen.of({"read"}) if key in TABLES] == TABLES
    kept.columns()
    kept.columns(["label", "id"])
    assert [key for key in seen.of({"read"}) if key in TABLES] == 2 * TABLES


def test_columns_of_a_run_whose_tokens_are_not_there_yet(blobs: Blobs) -> None:
    write_kept_store(blobs)
    blobs.delete(tokens_key("0000"))
    store = actstore.open(blobs.url)
    assert store.columns == KEEP
    with pytest.raises(NotCommittedError, match="the columns that run 0000 keeps are not committed"):
        _ = store.rows


def test_a_store_that_grows_shows_its_rows(blobs: Blobs) -> None:
    plan = write_kept_store(blobs)
    store = actstore.open(blobs.url)
    assert store.rows.num_rows == 140
    more = keeping(tokens_run("0001"), "id")
    write_run(blobs, more, segments=())
    name_tables(blobs, more, kept_table(0, 3).select(["id"]))
    store.refresh()
    assert store.rows.num_rows == 143
    assert store.column("label").to_pylist()[-4:] == [ALL["label"][-1].as_py(), None, None, None]
    assert plan.request.tokens.keep == KEEP


@pytest.mark.parametrize("what", ["missing", "changed", "too large", "not named"])
def test_damage_is_reported(blobs: Blobs, what: str) -> None:
    plan = write_kept_store(blobs)
    message = f"{TABLES[1]} is damaged: it is not what was committed; run `actstore verify"
    if what == "missing":
        blobs.delete(TABLES[1])
        message = TABLES[1]
    elif what == "changed":
        overwrite(blobs, TABLES[1], bytes(blobs.read(TABLES[0])))
        message = f"{TABLES[1]}.*"
    elif what == "not named":
        name_tables(blobs, plan)
        message = "tokens.json is damaged: it does not name the tables of the kept columns in order"
    else:
        record = TokensRecord.read(blobs, tokens_key("0000"))
        large = record.tables[1].model_copy(update={"nbytes": 1 << 40})
        changed = record.model_copy(update={"tables": (record.tables[0], large)})
        overwrite(blobs, tokens_key("0000"), changed.to_bytes())
        message = f"{TABLES[1]} is damaged: it has 1099511627776 bytes, and .* are the most"
    with pytest.raises(StorageError, match=message):
        actstore.open(blobs.url).column("id")


def test_documents_beyond_the_rows_are_damage(blobs: Blobs) -> None:
    plan = keeping(example_plan(), *KEEP)
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    name_tables(blobs, plan, kept_table(0, 3))
    kept = KeptColumns(blobs, read_runs(blobs))
    assert kept.rows_of(np.array([[0, -1, 2]]), np.array([4])).tolist() == [[0, -1, 2]]
    with pytest.raises(StorageError, match="its tables have 3 rows, and there is a document 3"):
        kept.rows_of(np.array([[0, 3]]), np.array([4]))
