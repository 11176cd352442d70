"""Checking the tables of kept columns: one row for each document, of the columns and types of all tables."""

import pyarrow as pa

from actstore.errors import StorageError
from actstore.store.format.kept_table import decode_table
from actstore.store.format.plan import Plan
from actstore.store.format.shard import crc32c
from actstore.store.records.commit import ObjectRecord, TokensRecord, tokens_key
from actstore.store.verifying.inspection import Inspection


def check_tables(inspection: Inspection, plan: Plan, record: TokensRecord, last_document: int) -> None:
    """Check every table that a tokens record names.

    Args:
        inspection: collects the findings.
        plan: the plan of the run.
        record: its tokens record, which names tables in order.
        last_document: the highest number of a document in the intact token shards; -1 if there is none.
    """
    n_rows, types = 0, None
    is_whole = True
    for named in record.tables:
        table = _checked(inspection, plan, named)
        if table is None:
            is_whole = False
            continue
        n_rows += table.num_rows
        if types is None:
            types = table.schema
        elif table.schema != types:
            inspection.report(named.key, "has columns of other types than the tables before", run=plan.run)
    if record.tables and is_whole and last_document >= n_rows:
        problem = f"names tables of {n_rows} rows, and there is a document {last_document}"
        inspection.report(tokens_key(plan.run), problem, run=plan.run)


def _checked(inspection: Inspection, plan: Plan, named: ObjectRecord) -> pa.Table | None:
    """A table that agrees with its record; otherwise None."""
    try:
        data = inspection.read(named.key)
        if len(data) != named.nbytes:
            problem = f"has {len(data)} bytes where {named.nbytes} were committed"
        elif (checksum := crc32c(data)) != named.crc32c:
            problem = f"has crc32c {checksum} where {named.crc32c} was committed"
        else:
            return decode_table(data, plan.request.tokens.keep)
        inspection.report(named.key, problem, run=plan.run)
    except StorageError as error:
        inspection.report_error(named.key, error, run=plan.run)
    return None
