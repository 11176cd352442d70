"""Columns of prompts that are repeated beside each of their continuations."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from actstore.tokens.keeping.json_type import JsonType


class PromptColumns:
    """Takes the rows of a source of prompts, and holds the columns to keep, as JSON has them."""

    def __init__(self, names: Sequence[str]) -> None:
        """
        Args:
            names: columns, in order.
        """
        self._types = {name: JsonType() for name in names}
        self.rows: list[dict[str, Any]] = []
        """The values of the columns by name, row by row."""

    def add_record(self, record: Mapping[str, Any], where: str) -> None:
        """Take a record of JSON; a key that it lacks is null.

        Raises:
            TokensError: a value is none of JSON, or of another type than those before.
        """
        row = {name: record.get(name) for name in self._types}
        for name, value in row.items():
            self._types[name].see(value, f"{name} in {where}")
        self.rows.append(row)

    def add_rows(self, rows: pa.RecordBatch) -> None:
        """Take rows that are Arrow already.

        Raises:
            TokensError: a value is none of JSON, or of another type than those before.
        """
        for row in rows.select(list(self._types)).to_pylist():
            self.add_record(row, f"prompt {len(self.rows)}")
