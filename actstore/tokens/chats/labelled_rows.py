"""Packed rows of chats with the roles and turns of their tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actstore.tokens.batch import TokenIds
from actstore.tokens.chats.chat import NO_TURN, PADDING, TEMPLATE, ChatBatch
from actstore.tokens.chats.renderer import Render
from actstore.tokens.chats.token_roles import chat_tokens
from actstore.tokens.pack import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenLabels:
    """Notes the roles and turns of documents, and gives them to the rows that are packed from these documents.

    Packing says for each token which document it came from, and where it was in it; so any packing will do.
    """

    def __init__(self) -> None:
        self._noted: dict[int, tuple[NDArray[np.int8], NDArray[np.int32]]] = {}
        """Roles and turns of documents whose tokens may be in the next rows, by number, ascending."""

    def note(self, number: int, roles: NDArray[np.int8], turns: NDArray[np.int32]) -> None:
        """Note the roles and turns, [n_tokens] each, of the next document before packing takes it."""
        self._noted[number] = roles, turns

    def labelled(self, blocks: Iterable[Rows]) -> Iterator[Rows]:
        """Yield blocks of rows that were packed from these documents, with roles and turns."""
        for block in blocks:
            yield self._labelled(block)
            last = int(block.documents.max(initial=-1))
            for number in [number for number in self._noted if number < last]:
                del self._noted[number]

    def _labelled(self, block: Rows) -> Rows:
        # The token put in for an empty document has its number, and no offset.
        is_token = block.offsets >= 0
        numbers = np.unique(block.documents[is_token])
        noted = [self._noted[number] for number in numbers.tolist()]
        starts = np.cumsum([0, *(len(roles) for roles, _ in noted)])
        at = starts[np.searchsorted(numbers, block.documents[is_token])] + block.offsets[is_token]
        # Tokens that packing put in are the template's, so to say.
        roles = np.full(block.tokens.shape, TEMPLATE, np.int8)
        turns = np.full(block.tokens.shape, NO_TURN, np.int32)
        if noted:
            roles[is_token] = np.concatenate([its_roles for its_roles, _ in noted])[at]
            turns[is_token] = np.concatenate([its_turns for _, its_turns in noted])[at]
        roles[np.arange(block.tokens.shape[1]) >= block.lengths[:, None]] = PADDING
        return replace(block, roles=roles, turns=turns)


def chat_documents(
    batches: Iterable[ChatBatch],
    tokenizer: "PreTrainedTokenizerBase",
    render: Render,
    labels: TokenLabels,
) -> Iterator[tuple[int, TokenIds]]:
    """Yield the number and the token ids of each chat, whose roles and turns are noted before.

    Args:
        batches: number of the first chat of each batch, and its chats.
        tokenizer: a fast tokenizer.
        render: renders messages by the template.
        labels: takes the roles and turns.

    Raises:
        TokensError: a chat cannot be read, rendered or aligned.
    """
    for first, chats in batches:
        for number, chat in enumerate(chat_tokens(chats, first, tokenizer, render), first):
            labels.note(number, chat.roles, chat.turns)
            yield number, chat.ids
