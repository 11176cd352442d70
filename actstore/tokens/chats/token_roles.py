"""The role and the message of each token of a chat."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.tokens.batch import TokenIds
from actstore.tokens.chats.alignment import RenderedChat, align
from actstore.tokens.chats.chat import NO_TURN, TEMPLATE, Chat, Message, role_number
from actstore.tokens.chats.renderer import Render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatTokens:
    """The tokens of a chat."""

    ids: TokenIds
    """[n_tokens]"""
    roles: NDArray[np.int8]
    """Role of each token, [n_tokens], by `actstore.tokens.chats.chat.ROLES`."""
    turns: NDArray[np.int32]
    """Number of the message of each token, [n_tokens]; -1 for the template's own text."""


def chat_tokens(
    chats: Sequence[Chat], first: int, tokenizer: "PreTrainedTokenizerBase", render: Render
) -> Iterator[ChatTokens]:
    """Render chats and make tokens of them, those of ``tokenizer.apply_chat_template(messages, tokenize=True)``.

    Args:
        chats: the chats; an empty one has no tokens.
        first: number of the first of them, for messages of errors.
        tokenizer: a fast tokenizer, one that tells which characters a token is made of.
        render: renders messages by the template.

    Raises:
        TokensError: a chat cannot be rendered or aligned; the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise TokensError(
            f"the tokenizer {name} does not tell which characters a token is made of, so tokens of chats have no "
            "roles; choose one with a tokenizer.json"
        )
    rendered = [_rendered(chat, first + number, render) for number, chat in enumerate(chats)]
    encoded = _encoded(tokenizer, [one.text for one in rendered])
    for chat, one, (ids, offsets) in zip(chats, rendered, encoded, strict=True):
        roles, turns = roles_of(one, chat.messages, offsets)
        yield ChatTokens(ids, roles, turns)


def _rendered(chat: Chat, number: int, render: Render) -> RenderedChat:
    if not chat.messages:
        return RenderedChat("", ())
    try:
        rendered = align(chat.messages, render)
        rendered.text.encode("utf-8")
    except TokensError as error:
        raise TokensError(f"chat {number} ({chat.where}): {error}") from error
    except UnicodeEncodeError as error:
        # A tokenizer would fail on it without naming the place.
        raise TokensError(f"chat {number} ({chat.where}) has half a surrogate pair; mend it") from error
    return rendered


def _encoded(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]
) -> Iterator[tuple[TokenIds, NDArray[np.int64]]]:
    """The ids [n] of each text, and the characters [n, 2] of each token, first and behind the last."""
    encoded: Any = tokenizer(
        list(texts),
        add_special_tokens=False,  # the template writes them
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2)


def roles_of(
    rendered: RenderedChat, messages: Sequence[Message], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """The roles and turns of tokens.

    A token is of the message that most of its characters are from; of as many, rather of a message than of the
    template, and of the earlier one in the text.

    Args:
        rendered: the text.
        messages: its messages.
        offsets: the characters of each token, first and behind the last, [n_tokens, 2].

    Returns:
        roles [n_tokens] and turns [n_tokens].
    """
    # The text in stretches that are each of one message or of the template, [n_stretches].
    starts, turns = [0], [NO_TURN]
    for start, stop, turn in rendered.spans:
        starts += [start, stop]
        turns += [turn, NO_TURN]
    first = np.array(starts, np.int64)
    stretches = np.searchsorted(first, offsets[:, 0], side="right") - 1
    # A token without characters is of the place where it stands.
    last = np.searchsorted(first, np.maximum(offsets[:, 1] - 1, offsets[:, 0]), side="right") - 1
    for token in np.flatnonzero(stretches != last):
        touched = range(stretches[token], last[token] + 1)
        ends = np.append(first[touched.start + 1 : touched.stop], offsets[token, 1])
        begins = np.append(offsets[token, 0], first[touched.start + 1 : touched.stop])
        sizes = (ends - begins).tolist()
        stretches[token] = max(touched, key=lambda at: (sizes[at - touched.start], turns[at] != NO_TURN, -at))
    token_turns = np.array(turns, np.int32)[stretches]
    numbers = np.array([*map(role_number, messages), TEMPLATE], np.int8)  # turn -1 is the last one
    return numbers[token_turns], token_turns
