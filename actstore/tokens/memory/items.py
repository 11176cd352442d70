"""Prompts one by one: text, chats, or token ids in a list, a tuple, an array or a tensor."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np

from actstore.errors import TokensError
from actstore.tokens.batch import MAX_DOCUMENT_NBYTES, TokenIds
from actstore.tokens.chats.chat import Chat, chat_of
from actstore.tokens.column import Kind
from actstore.tokens.memory.array import as_numpy, is_array, row_of, rows_of, without_padding
from actstore.tokens.record import text_of

Document = str | TokenIds | Chat
_NAMES: Final = {"text": "text", "tokens": "token ids", "chats": "a chat"}


def kind_of(item: Any, where: str) -> Kind:
    """Whether a prompt is text, token ids or a chat, a list of messages.

    Raises:
        TokensError: it is neither; the message says what to give.
    """
    if isinstance(item, str):
        return "text"
    if is_array(item) and item.ndim:
        return "tokens"
    if isinstance(item, list | tuple):
        first = next(iter(item), None)
        if isinstance(first, Mapping):
            return "chats"
        if isinstance(first, str):
            raise TokensError(
                f"{where} is a list of texts, and a prompt is one text; join them, or give each as one"
            )
        return "tokens"
    if isinstance(item, Mapping):
        raise TokensError(
            f"{where} is a single message, and a chat is a list of messages; a single chat is given as "
            '[[{"role": "user", "content": "..."}]]'
        )
    if item is None:
        raise TokensError(f"{where} is None; leave it out, or give the text ''")
    if isinstance(item, int | float | np.number) or is_array(item):
        raise TokensError(
            f"{where} is the number {item!r}, and a prompt is a text or a list of token ids; a single prompt of ids is "
            "given as [[1, 2, 3]]"
        )
    raise TokensError(
        f"{where} is of type {type(item).__name__}, and a prompt is a text or a list of token ids"
    )


def documents(items: Iterable[Any], kind: Kind) -> Iterator[Document]:
    """The documents of prompts of one kind. An array [n, position] among the prompts gives a document for each row.

    Args:
        items: the prompts.
        kind: what all of them must be.

    Raises:
        TokensError: a prompt is of another kind, or no text or ids.
    """
    for number, item in enumerate(items):
        where = f"prompt {number}"
        its_kind = kind if kind == "chats" and item == [] else kind_of(item, where)
        if its_kind != kind:
            were = "chats" if kind == "chats" else _NAMES[kind]
            raise TokensError(
                f"{where} is {_NAMES[its_kind]}, and the prompts before are {were}; give prompts of one kind"
            )
        if kind == "chats":
            yield chat_of(item, where)
            continue
        if isinstance(item, str):
            yield checked_text(item, where)
        elif is_array(item):
            yield from rows_of(item, where)
        else:
            yield _ids(item, where)


def masked(rows: Iterable[Any], masks: Iterable[Any]) -> Iterator[TokenIds]:
    """Rows of ids without their padding; see `without_padding`."""
    for number, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        where = f"row {number} of input_ids"
        ids = row_of(as_numpy(row), where) if is_array(row) else _ids(row, where)
        yield without_padding(ids, mask, where)


def checked_text(text: str, where: str) -> str:
    """The text itself.

    Raises:
        TokensError: it is too long, or no tokenizer takes it.
    """
    if len(text) > MAX_DOCUMENT_NBYTES:
        raise TokensError(
            f"{where} has {len(text):,} characters, and a document has at most {MAX_DOCUMENT_NBYTES:,}; split it"
        )
    return text_of(text, where)


def _ids(item: Sequence[Any], where: str) -> TokenIds:
    if not item:
        return np.empty(0, np.int32)
    try:
        ids = np.array(item)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise TokensError(f"{where} is not a flat list of token ids") from error
    if ids.ndim != 1 or ids.dtype.kind == "O":
        raise TokensError(f"{where} is not a flat list of token ids")
    return row_of(ids, where)


def peeked(items: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """(the first item, all items). Raises StopIteration if there is none."""
    iterator = iter(items)
    first = next(iterator)
    return first, chain([first], iterator)
