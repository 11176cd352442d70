"""Writing kept columns to a store: tables that are created, or adopted where they hold the same rows."""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from actstore.errors import PlanMismatchError, StorageError, TokensError
from actstore.storage.blobs import Blobs
from actstore.store.format.kept_table import encode_table, is_table
from actstore.store.format.plan import Plan
from actstore.store.format.shard import crc32c
from actstore.store.reading.kept_columns import KeptColumns
from actstore.store.records.commit import ObjectRecord, columns_key
from actstore.store.records.run import Run
from actstore.tokens import KeptRows


def check_types(schema: pa.Schema) -> None:
    """Check that a store can hold columns of these types.

    Raises:
        TokensError: it cannot.
    """
    for field in schema:
        try:
            encode_table(pa.schema([field]).empty_table())
        except StorageError as error:
            raise TokensError(
                f"column {field.name} is {field.type}, which Parquet files cannot hold; leave it out of keep, or "
                "write it to the source as text"
            ) from error


def check_beside(blobs: Blobs, runs: Sequence[Run], plan: Plan, kept: KeptRows) -> None:
    """Check that columns of a further part have the types that they have in the parts that are there.

    Raises:
        PlanMismatchError: one has another.
    """
    stored = KeptColumns(blobs, [run for run in runs if run.has_tokens and run.plan.run != plan.run])
    for name in stored.names:
        if name not in kept.names:
            continue
        there, here = stored.columns([name])[name].type, kept.schema.field(name).type
        if there != here and not pa.types.is_null(there) and not pa.types.is_null(here):
            raise PlanMismatchError(
                f"column {name} is {there} in the store at {blobs.url} and {here} in {plan.request.tokens.source}; "
                "write it with the same type, leave it out of keep, or choose another out"
            )


def put_tables(blobs: Blobs, plan: Plan, kept: KeptRows) -> Iterator[ObjectRecord]:
    """Write the tables of a run, each before the next one is made, and yield their records.

    Raises:
        StorageError: writing failed, or there are other rows in their place.
    """
    for number, table in enumerate(kept.tables()):
        key, data = columns_key(plan.run, number), encode_table(table)
        if blobs.create(key, [data]):
            yield ObjectRecord(key=key, nbytes=len(data), crc32c=crc32c(data))
            continue
        there = blobs.read(key)
        if bytes(there) != data and not is_table(there, data, kept.names):
            raise StorageError(
                f"{blobs.url}/{key} holds other rows than the source gives now; it was left by an earlier attempt: "
                f"run `actstore verify {blobs.url} --repair`, then the same command again"
            )
        yield ObjectRecord(key=key, nbytes=len(there), crc32c=crc32c(there))
