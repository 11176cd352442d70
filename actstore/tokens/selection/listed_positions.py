"""The positions that a column of a source lists for each document."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from actstore.errors import TokensError
from actstore.tokens.keeping.row_taker import RowTaker


class ListedPositions:
    """Takes the rows of a source, notes the positions that a column lists, and passes the rows on."""

    def __init__(self, name: str, kept: RowTaker | None) -> None:
        """
        Args:
            name: column with lists of whole numbers. A null lists none.
            kept: takes the rows as well.
        """
        self._name = name
        self._kept = kept
        self._n_documents = 0
        self.listed: dict[int, list[int]] = {}
        """By document, the listed positions; documents without any are missing."""

    def add_record(self, record: Mapping[str, Any], where: str) -> None:
        """Take a record of JSON.

        Raises:
            TokensError: it has no list of whole numbers there.
        """
        self._note(record.get(self._name))
        if self._kept is not None:
            self._kept.add_record(record, where)

    def add_rows(self, rows: pa.RecordBatch) -> None:
        """Take rows that are Arrow already.

        Raises:
            TokensError: one of them has no list of whole numbers there.
        """
        for value in rows.column(self._name).to_pylist():
            self._note(value)
        if self._kept is not None:
            self._kept.add_rows(rows)

    def forget_before(self, document: int) -> None:
        """Forget documents that are packed, so that memory stays bounded."""
        self.listed = {number: listed for number, listed in self.listed.items() if number >= document}

    def _note(self, value: object) -> None:
        if value is not None and not (
            isinstance(value, list) and all(type(position) is int for position in value)
        ):
            raise TokensError(
                f"column {self._name} has no list of positions for document {self._n_documents}; give whole numbers, "
                "such as [0, -1], or null for none"
            )
        if value:
            self.listed[self._n_documents] = value
        self._n_documents += 1
