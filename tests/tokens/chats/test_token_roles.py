"""The role and the message of each token, compared with a count of its characters by hand."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from actstore.errors import TokensError
from actstore.tokens.chats.alignment import RenderedChat
from actstore.tokens.chats.chat import ROLES, chat_of
from actstore.tokens.chats.renderer import Render, Renderer
from actstore.tokens.chats.template import ChatTemplate
from actstore.tokens.chats.token_roles import chat_tokens, roles_of
from tests.tokens.chats.shapes import SHAPES, Parts, text_of, turns_of
from tests.tokens.chats.strategies import alternating

Rendering = Callable[..., Render]


def expected_turns(tokenizer: Any, parts: Parts) -> list[int]:
    """The message that most characters of a token are from; of as many, a message rather than the template."""
    by_character = turns_of(parts)
    offsets = tokenizer(text_of(parts), add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    turns = []
    for start, stop in offsets:
        touched = by_character[start:stop]
        counts = Counter(touched)
        most = max(counts.values())
        turns.append(next((t for t in touched if t >= 0 and counts[t] == most), -1))
    return turns


@pytest.mark.parametrize("shape", ["chatml", "gemma", "llama"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(messages=alternating())
def test_tokens_are_those_of_the_tokenizer_and_have_their_roles(
    tokenizer: Any, rendering: Rendering, shape: str, messages: list[dict[str, Any]]
) -> None:
    template, build = SHAPES[shape].template, SHAPES[shape].build
    (chat,) = chat_tokens([chat_of(messages, "x")], 0, tokenizer, rendering(template))
    ids = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True)["input_ids"]
    assert chat.ids.tolist() == ids
    turns = expected_turns(tokenizer, build(messages))
    assert chat.turns.tolist() == turns
    numbers = {"system": 1, "user": 2, "assistant": 3}
    assert chat.roles.tolist() == [0 if turn < 0 else numbers[messages[turn]["role"]] for turn in turns]


@pytest.mark.parametrize(
    ("token", "turn"),
    [
        ((0, 3), -1),
        ((2, 4), 0),  # one character each: the message's
        ((1, 4), -1),
        ((4, 7), 0),  # two of message 0, one of message 1
        ((5, 7), 0),  # one each: the earlier one's
        ((5, 8), 1),
        ((2, 10), 0),  # as many of both messages
        ((9, 11), -1),
        ((3, 3), 0),
        ((0, 0), -1),
    ],
)
def test_a_token_across_borders_is_of_most_of_its_characters(token: tuple[int, int], turn: int) -> None:
    rendered = RenderedChat("tttaaabbbttt", ((3, 6, 0), (6, 9, 1)))
    messages = [{"role": "user"}, {"role": "assistant"}]
    roles, turns = roles_of(rendered, messages, np.array([token], np.int64))
    assert turns.tolist() == [turn]
    assert roles.tolist() == [{-1: 0, 0: 2, 1: 3}[turn]]
    assert (str(roles.dtype), str(turns.dtype)) == ("int8", "int32")


def test_a_chat_without_messages_has_no_tokens(tokenizer: Any, rendering: Rendering) -> None:
    (chat,) = chat_tokens([chat_of(None, "x")], 0, tokenizer, rendering(SHAPES["chatml"].template))
    assert [len(values) for values in (chat.ids, chat.roles, chat.turns)] == [0, 0, 0]


def test_an_error_names_the_chat(tokenizer: Any, rendering: Rendering) -> None:
    chats = [chat_of([{"role": "user", "content": text}], f"line {text}") for text in ("1", "two")]
    render = rendering("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(
        TokensError, match=r"chat 8 \(line two\): the chat template writes content of message 0"
    ):
        list(chat_tokens(chats, 7, tokenizer, render))
    half = chat_of([{"role": "user", "content": "\ud83d"}], "line 3")
    with pytest.raises(TokensError, match=r"chat 0 \(line 3\) has half a surrogate pair"):
        list(chat_tokens([half], 0, tokenizer, rendering(SHAPES["chatml"].template)))


def test_a_real_tokenizer_and_its_own_template(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": " Paris. 👩🏽‍🚀 <|im_end|>\n"},
        {"role": "user", "content": "And of Österreich?\n"},
        {"role": "assistant", "content": ""},
    ]
    with Renderer(ChatTemplate.of(tokenizer, add_generation_prompt=True)) as render:
        (chat,) = chat_tokens([chat_of(messages, "x")], 0, tokenizer, render)
    encoded = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        add_generation_prompt=True,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert chat.ids.tolist() == encoded["input_ids"]
    assert not any(encoded["assistant_masks"])
    # Each message is between special tokens, so its tokens are its text and no more.
    for turn, message in enumerate(messages):
        ids = chat.ids[chat.turns == turn]
        assert tokenizer.decode(ids) == message["content"]
        assert set(chat.roles[chat.turns == turn]) <= {ROLES[message["role"]]}
    rest = tokenizer.decode(chat.ids[chat.turns == -1])
    assert rest.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rest.endswith("<|im_start|>assistant\n")
    assert json.dumps(sorted(set(chat.roles.tolist()))) == "[0, 2, 3]"
