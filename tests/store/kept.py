"""Small stores with kept columns."""

from typing import Any, Final

import pyarrow as pa

from actstore.storage.blobs import Blobs
from actstore.store.format.kept_table import encode_table
from actstore.store.format.plan import Plan
from actstore.store.format.shard import crc32c
from actstore.store.records.commit import ObjectRecord, TokensRecord, columns_key, tokens_key
from tests.store.example import example_plan, example_values, write_store

KEEP: Final = ("id", "label")


def keeping(plan: Plan, *names: str) -> Plan:
    """The plan with columns that are kept."""
    tokens = plan.request.tokens.model_copy(update={"keep": names})
    return plan.model_copy(update={"request": plan.request.model_copy(update={"tokens": tokens})})


def kept_table(first: int, n: int) -> pa.Table:
    """Rows of the columns `KEEP` for documents from `first` on."""
    numbers = range(first, first + n)
    labels = pa.array([None if i % 5 == 0 else i % 3 for i in numbers], pa.int64())
    return pa.table({"id": [f"d{i}" for i in numbers], "label": labels})


def name_tables(blobs: Blobs, plan: Plan, *tables: pa.Table) -> None:
    """Write tables, and name them in the tokens record in the place of those before."""
    records = []
    for number, table in enumerate(tables):
        key, data = columns_key(plan.run, number), encode_table(table)
        blobs.create(key, [data])
        records.append(ObjectRecord(key=key, nbytes=len(data), crc32c=crc32c(data)))
    record = TokensRecord.read(blobs, tokens_key(plan.run))
    blobs.delete(tokens_key(plan.run))
    named = record.model_copy(update={"tables": tuple(records)})
    assert blobs.create(tokens_key(plan.run), [named.to_bytes()])


def write_kept_store(blobs: Blobs, **changes: Any) -> Plan:
    """Write a complete run that keeps `KEEP` in two tables."""
    plan = keeping(example_plan(**changes), *KEEP)
    write_store(blobs, plan, example_values(plan), range(plan.n_segments))
    name_tables(blobs, plan, kept_table(0, 100), kept_table(100, 40))
    return plan
