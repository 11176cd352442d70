"""Chats in memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from actstore.tokens.batch import in_batches
from actstore.tokens.chats.chat import ChatBatch, chat_of
from actstore.tokens.keeping.row_taker import RowTaker


class ChatList:
    """Chats that Python gives, as a source of documents.

    They are kept, since a source can be read again.
    """

    kind: Literal["chats"] = "chats"
    column: None = None
    files: tuple[()] = ()
    keep: tuple[()] = ()

    def __init__(self, chats: Iterable[Sequence[Mapping[str, Any]]]) -> None:
        """
        Args:
            chats: lists of messages.

        Raises:
            TokensError: one of them is no list of messages.
        """
        self._chats = [chat_of(chat, f"tokens[{number}]") for number, chat in enumerate(chats)]

    def batches(self, kept: RowTaker | None = None) -> Iterator[ChatBatch]:
        """Yield the number of a batch's first chat, and its chats. There are no columns to keep."""
        assert kept is None  # `keep` is empty
        return in_batches(self._chats)
