"""Packed rows of chats with the roles and turns of their tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from actstore.tokens.batch import TokenIds
from actstore.tokens.chats.chat import NO_TURN, PADDING, TEMPLATE, ChatBatch
from actstore.tokens.chats.renderer import Render
from actstore.tokens.chats.token_roles import ChatTokens, chat_tokens
from actstore.tokens.pack import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatPacking:
    """Gives the tokens of chats to packing, and the rows that come out of it their roles and turns.

    Packing says for each token which document it came from, and where it was in it; so any packing will do.
    """

    def __init__(
        self,
        batches: Iterable[ChatBatch],
        tokenizer: "PreTrainedTokenizerBase",
        render: Render,
    ) -> None:
        """
        Args:
            batches: number of the first chat of each batch, and its chats.
            tokenizer: a fast tokenizer.
            render: renders messages by the template.
        """
        self._batches, self._tokenizer, self._render = batches, tokenizer, render
        self._packed: dict[int, ChatTokens] = {}
        """Chats whose tokens may be in the next rows, by number, ascending."""

    def documents(self) -> Iterator[tuple[int, TokenIds]]:
        """Yield the number and the token ids of each chat.

        Raises:
            TokensError: a chat cannot be read, rendered or aligned.
        """
        for first, chats in self._batches:
            tokens = chat_tokens(chats, first, self._tokenizer, self._render)
            for number, chat in enumerate(tokens, first):
                self._packed[number] = chat
                yield number, chat.ids

    def labelled(self, blocks: Iterable[Rows]) -> Iterator[Rows]:
        """Yield blocks of rows that were packed from these documents, with roles and turns."""
        for block in blocks:
            yield self._labelled(block)
            last = int(block.documents.max(initial=-1))
            for number in [number for number in self._packed if number < last]:
                del self._packed[number]

    def _labelled(self, block: Rows) -> Rows:
        is_token = block.documents >= 0
        numbers = np.unique(block.documents[is_token])
        chats = [self._packed[number] for number in numbers.tolist()]
        starts = np.cumsum([0, *(len(chat.ids) for chat in chats)])
        at = starts[np.searchsorted(numbers, block.documents[is_token])] + block.offsets[is_token]
        # Tokens that packing put in are the template's, so to say.
        roles = np.full(block.tokens.shape, TEMPLATE, np.int8)
        turns = np.full(block.tokens.shape, NO_TURN, np.int32)
        if chats:
            roles[is_token] = np.concatenate([chat.roles for chat in chats])[at]
            turns[is_token] = np.concatenate([chat.turns for chat in chats])[at]
        roles[np.arange(block.tokens.shape[1]) >= block.lengths[:, None]] = PADDING
        return replace(block, roles=roles, turns=turns)
