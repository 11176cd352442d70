"""The roles and turns that columns of a source list for the tokens of each document."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.tokens.batch import TokenIds
from actstore.tokens.chats.chat import NO_TURN, ROLES, TEMPLATE
from actstore.tokens.chats.labelled_rows import TokenLabels
from actstore.tokens.keeping.row_taker import RowTaker

COLUMNS: Final = ("roles", "turns")
"""The columns: of each token the role, by number, and the number of its message."""


class ListedRoles:
    """Takes the rows of a source of token ids, notes the roles and turns that they list, and passes the rows on."""

    def __init__(self, labels: TokenLabels, beyond: RowTaker | None) -> None:
        """
        Args:
            labels: takes the roles and turns.
            beyond: takes the rows as well.
        """
        self._labels = labels
        self._beyond = beyond
        self._n_rows = 0
        self._waiting: dict[int, tuple[Any, Any]] = {}
        """Lists of roles and turns of documents that were read and not used yet."""

    def add_record(self, record: Mapping[str, Any], where: str) -> None:
        """Take a record of JSON."""
        self._take(*(record.get(name) for name in COLUMNS))
        if self._beyond is not None:
            self._beyond.add_record(record, where)

    def add_rows(self, rows: pa.RecordBatch) -> None:
        """Take rows that are Arrow already."""
        for listed in zip(*(rows.column(name).to_pylist() for name in COLUMNS), strict=True):
            self._take(*listed)
        if self._beyond is not None:
            self._beyond.add_rows(rows)

    def documents(self, documents: Iterable[tuple[int, TokenIds]]) -> Iterator[tuple[int, TokenIds]]:
        """The same documents, whose roles and turns are noted before each is given.

        Raises:
            TokensError: a document has no role and turn for each of its tokens, or they contradict each other.
        """
        for number, ids in documents:
            roles, turns = (
                _listed(values, len(ids), name, number)
                for values, name in zip(self._waiting.pop(number), COLUMNS, strict=True)
            )
            _check(roles, turns, number)
            self._labels.note(number, roles.astype(np.int8), turns.astype(np.int32))
            yield number, ids

    def _take(self, roles: object, turns: object) -> None:
        self._waiting[self._n_rows] = roles, turns
        self._n_rows += 1


def _listed(values: Any, n: int, name: str, number: int) -> NDArray[np.int64]:
    """One number for each token of a document, [n]; a null lists none."""
    listed = [] if values is None else values
    if not isinstance(listed, list) or not all(type(one) is int and abs(one) < 2**31 for one in listed):
        raise TokensError(f"{name} of document {number} is no list of whole numbers; give one for each token")
    if len(listed) != n:
        raise TokensError(
            f"{name} of document {number} has {len(listed)} numbers, and the document has {n} tokens; give one for "
            "each token"
        )
    return np.array(listed, np.int64)


def _check(roles: NDArray[np.int64], turns: NDArray[np.int64], number: int) -> None:
    wrong = roles[(roles < TEMPLATE) | (roles > max(ROLES.values()))]
    if len(wrong):
        known = ", ".join(f"{one} {name}" for name, one in ROLES.items())
        raise TokensError(f"roles of document {number} has {wrong[0]}; give {known}")
    if ((turns >= 0) != (roles > TEMPLATE)).any() or (turns < NO_TURN).any():
        raise TokensError(
            f"roles and turns of document {number} contradict each other: give the number of a message where the role "
            f"is above {TEMPLATE}, and {NO_TURN} elsewhere"
        )
    if ((turns[1:] == turns[:-1]) & (roles[1:] != roles[:-1])).any():
        raise TokensError(
            f"roles of document {number} change within a message; give the tokens of a message one role"
        )
