"""Packing documents into rows of equal length, with the document and offset that each token came from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from actstore.counted import counted
from actstore.errors import TokensError
from actstore.tokens.batch import TokenIds

Mode = Literal["concat", "document"]
Cut = Literal["left", "right"]
"""The end of a document that is cut off."""

BLOCK_TOKENS = 1 << 20
_MAX_LENGTH = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How documents become rows.

    "concat" joins documents and cuts rows from them, token for token as SAELens 6.54 does: a document continues in the
    next row, and the ragged tail of the source is dropped. "document" puts one document in a row and pads it on the
    right; one that is longer than a row is an error, unless `truncate` says where to cut it.
    """

    mode: Mode = "concat"
    context_length: int
    """Tokens in a row, including inserted ones."""
    begin_batch: int | None = None
    """Token id put first in each row, unless the row's first token is that id already."""
    begin_sequence: int | None = None
    """Token id put before each document, unless the document begins with it."""
    separator: int | None = None
    """Token id put before each document that does not begin a row, unless what follows begins with it."""
    pad: int | None = None
    """Token id that fills the rows of mode "document", which needs it; mode "concat" has nothing to pad."""
    truncate: Cut | None = None
    """The end at which mode "document" cuts a document that is longer than a row; None to refuse it."""
    kept: int | None = None
    """Token id that stays in front of a document that begins with it, when the document is cut at the left: BOS."""
    keeps_empty: bool = False
    """Whether mode "document" makes a row of an empty document, too."""
    always_begins: bool = False
    """Whether mode "document" puts its token even before a document that begins with it, as `HookedModel` does."""

    def __post_init__(self) -> None:
        """Raise TokensError if no row could be made this way."""
        if self.mode not in get_args(Mode):
            raise TokensError(f"the packing mode is {self.mode!r}; choose concat or document")
        if self.context_length < 1:
            raise TokensError(f"context_length is {self.context_length}; it must be 1 or more")
        if self.mode == "document" and self.pad is None:
            raise TokensError("packing one document a row needs a pad id, and none is given; any id will do")
        prefixed = self.begin_batch is not None or (
            self.mode == "document" and self.begin_sequence is not None
        )
        if self.truncate is not None and self.mode != "document":
            raise TokensError(
                "truncate is for documents that have a row each, and packing concat cuts nothing off; leave truncate "
                "out, or choose packing: document"
            )
        if self.context_length == 1 and prefixed:
            raise TokensError(
                "context_length is 1, which the token at the start of each row would fill; choose 2 or more"
            )


@dataclass(frozen=True)
class Rows:
    """Packed rows and the origin of each token; n rows of L tokens."""

    tokens: NDArray[np.int32]
    """Token ids, [n, L]."""
    lengths: NDArray[np.int32]
    """Number of tokens of each row before its padding, [n]."""
    documents: NDArray[np.int64]
    """Number of the document a token came from, [n, L]; -1 for inserted tokens and padding."""
    offsets: NDArray[np.int32]
    """Index of a token within its document's tokens, [n, L]; -1 for inserted tokens and padding."""
    cut: NDArray[np.int32]
    """Number of tokens of each row's document that were cut off, [n]."""
    roles: NDArray[np.int8] | None = None
    """Role of each token of chats, [n, L]; -1 for padding. None if documents are no chats."""
    turns: NDArray[np.int32] | None = None
    """Number of the message of each token of chats, [n, L]; -1 for what is of none. None if documents are no chats."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(
            self.tokens[rows],
            self.lengths[rows],
            self.documents[rows],
            self.offsets[rows],
            self.cut[rows],
            None if self.roles is None else self.roles[rows],
            None if self.turns is None else self.turns[rows],
        )


@dataclass
class _Seen:
    """Counts what went into the rows, for the message if no rows come out."""

    documents: int = 0
    tokens: int = 0


class _Block:
    """Rows that are filled from the first on, through flat views; `position` is row * L + column."""

    def __init__(self, n_rows: int, length: int, *, fill: int = 0) -> None:
        shape = (n_rows, length)
        self.rows = Rows(
            np.full(shape, fill, np.int32),
            np.full(n_rows, length, np.int32),
            np.full(shape, -1, np.int64),
            np.full(shape, -1, np.int32),
            np.zeros(n_rows, np.int32),
        )
        self.position = 0
        self.end = n_rows * length
        self._tokens = self.rows.tokens.reshape(-1)
        self._documents = self.rows.documents.reshape(-1)
        self._offsets = self.rows.offsets.reshape(-1)
        self._ramp = np.arange(length, dtype=np.int32)

    def insert(self, token: int) -> None:
        self._tokens[self.position] = token
        self.position += 1

    def write(self, number: int, ids: TokenIds, at: int, n: int) -> None:
        """Write n tokens of a document from offset `at` on, within one row."""
        span = slice(self.position, self.position + n)
        self._tokens[span] = ids[at : at + n]
        self._documents[span] = number
        np.add(self._ramp[:n], at, out=self._offsets[span])
        self.position += n

    def write_rows(self, number: int, ids: TokenIds, at: int, n_rows: int, lead: int | None) -> int:
        """Write whole rows, each `lead` and then tokens of a document from offset `at` on; return the number of tokens
        taken.
        """
        length: int = self.rows.tokens.shape[1]
        inserted = int(lead is not None)
        row = self.position // length
        rows, rest = slice(row, row + n_rows), slice(inserted, None)
        stop = at + n_rows * (length - inserted)
        if lead is not None:
            self.rows.tokens[rows, 0] = lead
        self.rows.tokens[rows, rest] = ids[at:stop].reshape(n_rows, -1)
        self.rows.documents[rows, rest] = number
        self.rows.offsets[rows, rest] = np.arange(at, stop, dtype=np.int32).reshape(n_rows, -1)
        self.position += n_rows * length
        return stop - at


def pack(
    documents: Iterable[tuple[int, TokenIds]],
    packing: Packing,
    *,
    max_rows: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Rows]:
    """Pack numbered documents (ids [n_tokens]) into blocks of about a million tokens; empty documents are skipped,
    unless `packing` keeps them.

    Stops reading documents once `max_rows` rows are made. Raises TokensError for a token id that is negative or not
    below `vocab_size`, and, at the end, if not one row came out, or documents were too long that may not be cut.
    """
    if max_rows is not None and max_rows < 1:
        raise TokensError(f"max_rows is {max_rows}; it must be 1 or more, or None for all rows")
    return _packed(documents, packing, max_rows, vocab_size)


def _packed(
    documents: Iterable[tuple[int, TokenIds]], packing: Packing, max_rows: int | None, vocab_size: int | None
) -> Iterator[Rows]:
    seen = _Seen()
    keeps_empty = packing.mode == "document" and packing.keeps_empty
    checked = _checked(documents, vocab_size, seen, keeps_empty=keeps_empty)
    n_rows = 0
    for rows in (_concat if packing.mode == "concat" else _one_per_row)(checked, packing, max_rows):
        n_rows += len(rows)
        yield rows
    if n_rows == 0 and seen.tokens == 0:
        n = counted(seen.documents, "document")
        problem = f"there is no token in its {n}" if seen.documents else "it has no documents"
        raise TokensError(f"the source has nothing to pack: {problem}")
    if n_rows == 0:
        raise TokensError(
            f"the text packs to 0 rows of {packing.context_length} tokens: it has only {seen.tokens} tokens; "
            "give more text or a smaller context_length"
        )


def _checked(
    documents: Iterable[tuple[int, TokenIds]], vocab_size: int | None, seen: _Seen, *, keeps_empty: bool
) -> Iterator[tuple[int, TokenIds]]:
    """The documents that hold tokens, or all, as int32, with ids checked against the vocabulary."""
    limit = 2**31 if vocab_size is None else vocab_size
    for number, ids in documents:
        seen.documents += 1
        n = len(ids)
        if n == 0:
            if keeps_empty:
                yield number, ids
            continue
        if n > _MAX_LENGTH:
            raise TokensError(
                f"document {number} has {n} tokens; split it, since a document has at most {_MAX_LENGTH}"
            )
        if ids.dtype != np.int32:
            _check(number, ids, limit)
            ids = ids.astype(np.int32)
        # As an unsigned number, a negative id is huge, so one comparison finds both kinds of bad id.
        elif int(ids.view(np.uint32).max()) >= limit:
            _check(number, ids, limit)
        seen.tokens += n
        yield number, ids


def _check(number: int, ids: NDArray[Any], limit: int) -> None:
    bad = np.flatnonzero((ids < 0) | (ids >= limit))
    if len(bad):
        raise TokensError(
            f"document {number} has the token id {ids[bad[0]]} at offset {bad[0]}, but ids must be 0 to "
            f"{limit - 1}; use the model that these tokens, or their tokenizer, were made for"
        )


def _block_sizes(packing: Packing, max_rows: int | None) -> Iterator[int]:
    """The number of rows of each block; endless, or `max_rows` in all."""
    n = max(1, BLOCK_TOKENS // packing.context_length)
    while max_rows is None or max_rows > 0:
        yield n if max_rows is None else min(n, max_rows)
        max_rows = None if max_rows is None else max_rows - n


def _concat(
    documents: Iterable[tuple[int, TokenIds]], packing: Packing, max_rows: int | None
) -> Iterator[Rows]:
    length = packing.context_length
    sizes = _block_sizes(packing, max_rows)
    block = _Block(next(sizes), length)
    for number, ids in documents:
        n, at, opens = len(ids), 0, True
        while at < n:
            column = block.position % length
            n_rows = 0 if column or opens else _whole_rows(block, ids, at, packing)
            if n_rows:
                at += block.write_rows(number, ids, at, n_rows, packing.begin_batch)
            else:
                room = length - column
                prefix = _prefix(int(ids[at]), packing, starts_row=column == 0, opens=opens)
                for token in prefix[:room]:
                    block.insert(token)
                # The end of a row can cut off begin_sequence after a separator; the next row then has to begin
                # with it.
                opens = len(prefix) > room
                taken = min(max(room - len(prefix), 0), n - at)
                block.write(number, ids, at, taken)
                at += taken
            if block.position == block.end:
                yield block.rows
                size = next(sizes, 0)
                if not size:
                    return
                block = _Block(size, length)
    if block.position >= length:
        yield block.rows[: block.position // length]


def _prefix(first: int, packing: Packing, *, starts_row: bool, opens: bool) -> list[int]:
    """The tokens inserted before a document's token `first` where a row, the document (`opens`) or both start."""
    prefix: list[int] = []
    opener = packing.begin_sequence
    if opens and opener is not None and first != opener:
        prefix, first = [opener], opener
    lead = packing.begin_batch if starts_row else packing.separator
    return prefix if lead is None or first == lead else [lead, *prefix]


def _whole_rows(block: _Block, ids: TokenIds, at: int, packing: Packing) -> int:
    """How many whole rows the document fills from the block's position on, all with begin_batch inserted.

    A row where the document itself has that token takes one token more, so it is left to the caller, as are single
    rows, which are faster to write there.
    """
    length, lead = packing.context_length, packing.begin_batch
    width = length - (lead is not None)
    n_rows = min((len(ids) - at) // width, (block.end - block.position) // length)
    if lead is not None and n_rows:
        already = ids[at : at + n_rows * width : width] == lead
        if already.any():
            n_rows = int(already.argmax())
    return n_rows if n_rows > 1 else 0


def _one_per_row(
    documents: Iterable[tuple[int, TokenIds]], packing: Packing, max_rows: int | None
) -> Iterator[Rows]:
    length, pad = packing.context_length, packing.pad
    assert pad is not None  # Packing checks this
    sizes = _block_sizes(packing, max_rows)
    block, row = _Block(next(sizes), length, fill=pad), 0
    n_documents = n_too_long = longest = 0
    for number, ids in documents:
        opener = opening_token(number, ids, packing)
        size = len(ids) + (opener is not None)
        n_documents += 1
        if size > length:
            n_too_long, longest = n_too_long + 1, max(longest, size)
            if packing.truncate is None:
                continue  # all are counted before they are refused
        block.position = row * length
        _write_document(block, row, number, ids, opener, packing)
        row += 1
        if row == len(block.rows):
            yield block.rows
            row, n_rows = 0, next(sizes, 0)
            if not n_rows:
                break
            block = _Block(n_rows, length, fill=pad)
    if n_too_long and packing.truncate is None:
        raise TokensError(
            f"{n_too_long:,} of {n_documents:,} documents do not fit in a sequence of {length} tokens, and the longest "
            f"needs {longest:,}; choose truncate: left or right (--truncate) to cut them at that end, or a larger "
            "context_length"
        )
    if row:
        yield block.rows[:row]


def opening_token(number: int, ids: TokenIds, packing: Packing) -> int | None:
    """The token that mode "document" puts before a document; None for none.

    Raises TokensError if nothing would be in the row.
    """
    opener = packing.begin_batch if packing.begin_sequence is None else packing.begin_sequence
    if len(ids) == 0:
        if opener is None:
            raise TokensError(
                f"document {number} is empty, and no token is put before it; leave it out, or choose "
                "begin_batch_token='bos' if the tokenizer has a BOS token"
            )
        return opener
    return None if ids[0] == opener and not packing.always_begins else opener


def _write_document(
    block: _Block, row: int, number: int, ids: TokenIds, opener: int | None, packing: Packing
) -> None:
    """Write one document into the row at the block's position, cut to fit."""
    begin = block.position
    if opener is not None:
        block.insert(opener)
    room = packing.context_length - (block.position - begin)
    n_cut = max(0, len(ids) - room)
    if n_cut and packing.truncate == "left":
        if opener is None and ids[0] == packing.kept:
            block.write(number, ids, 0, 1)
            room -= 1
        block.write(number, ids, len(ids) - room, room)
    else:
        block.write(number, ids, 0, len(ids) - n_cut)
    if not len(ids):
        block.rows.documents[row, 0] = number  # else no token would say whose row this is
    block.rows.lengths[row] = block.position - begin
    block.rows.cut[row] = n_cut
