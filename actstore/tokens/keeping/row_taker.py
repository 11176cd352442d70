"""What takes the rows of a source while its documents are read."""

from collections.abc import Mapping
from typing import Any, Protocol

import pyarrow as pa


class RowTaker(Protocol):
    """Takes the row of each document, in order, before the document is used."""

    def add_record(self, record: Mapping[str, Any], where: str) -> None:
        """Take a record of JSON; a key that it lacks is null. Raises TokensError for a value that cannot be taken."""

    def add_rows(self, rows: pa.RecordBatch) -> None:
        """Take rows that are Arrow already. Raises TokensError for a value that cannot be taken."""
