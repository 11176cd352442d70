"""Checking messages where they are read."""

from typing import Any

import pytest

from actstore.errors import TokensError
from actstore.tokens.chats.chat import chat_of, role_number

HELLO = {"role": "user", "content": "Hello"}


def test_fields_that_are_none_are_left_out_as_transformers_does() -> None:
    call = {"id": None, "function": {"name": "f", "arguments": {"a": None}}}
    chat = chat_of(
        [HELLO | {"name": None}, {"role": "assistant", "content": None, "tool_calls": [call]}], "x"
    )
    assert chat.messages == (
        HELLO,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]},
    )


@pytest.mark.parametrize(
    ("role", "number"),
    [
        ("system", 1),
        ("developer", 1),
        ("user", 2),
        ("assistant", 3),
        ("tool", 4),
        ("function", 4),
        ("ipython", 4),
    ],
)
def test_roles_have_numbers(role: str, number: int) -> None:
    assert role_number({"role": role}) == number


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("text", "x is a str, not a list of messages"),
        ([HELLO, "text"], "message 1 of x is a str, not an object with role and content"),
        ([{"from": "human", "value": "Hi"}], r"the role of message 0 of x is None \(its fields are: from, value\)"),
        ([{"role": "template", "content": ""}], "is 'template'; it can be system, user, assistant, tool"),
        ([{"role": "User", "content": ""}], "is 'User'"),
        ([{"role": "user", "content": 3}], "content of message 0 of x is a int, not a string"),
        ([{"role": "user", "reasoning_content": ["a"]}], "reasoning_content of message 0 of x is a list"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image'; only text parts"),
        ([{"role": "user", "content": ["a"]}], "a part of type 'str'"),
        ([{"role": "assistant", "tool_calls": {"name": "f"}}], "tool_calls of message 0 of x is a dict, not a list"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "a tool call of message 0 of x has no name"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_an_error_that_says_where(value: Any, problem: str) -> None:
    with pytest.raises(TokensError, match=problem):
        chat_of(value, "x")
