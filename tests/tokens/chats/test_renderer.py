"""Rendering in a process of its own: the same text as transformers gives, within bounds."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from actstore.errors import TokensError
from actstore.tokens.chats.renderer import Renderer, TemplateError
from actstore.tokens.chats.template import ChatTemplate
from tests.tokens.chats.shapes import QWEN, SHAPES

MESSAGES = [{"role": "user", "content": "Grüße 😀\n"}, {"role": "assistant", "content": "\u2028 \x00 \ud83d"}]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_text_is_that_of_transformers(tokenizer: Any, shape: str) -> None:
    settings: dict[str, Any] = {"add_generation_prompt": True, "tools": [{"name": "ä"}]}
    template = ChatTemplate.of(tokenizer, SHAPES[shape].template, **settings)
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=SHAPES[shape].template, tokenize=False, **settings
    )
    with Renderer(template) as render:
        assert render(MESSAGES) == expected


def test_arguments_reach_the_template(tokenizer: Any) -> None:
    template = ChatTemplate.of(tokenizer, "{{ bos_token }}{{ mood }}", arguments={"mood": ["fine"]})
    with Renderer(template) as render:
        assert render([]) == "<bos>['fine']"


def test_the_tokenizers_own_template_is_the_default(tokenizer: Any) -> None:
    tokenizer.chat_template = QWEN
    try:
        assert ChatTemplate.of(tokenizer).text == QWEN
    finally:
        tokenizer.chat_template = None
    with pytest.raises(TokensError, match=r"has no chat template .* chat_template \(--chat-template\)"):
        ChatTemplate.of(tokenizer)


def test_an_argument_that_would_hide_the_messages_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TokensError, match="chat_template_arguments has messages, tools"):
        ChatTemplate.of(tokenizer, "x", arguments={"messages": [], "tools": [], "a": 1})


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
            "takes more than 1 s of processor time",
        ),
        ("{{ 'x' * 99999999999 }}", "512 MiB of memory"),
        ("{{ '%99999999999d' % 1 }}", "512 MiB of memory"),
        ("{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "memory|characters"),
        ("{{ 'x' * 2000000 }}", "makes 2,000,000 characters of it, and 1,000,000 are the most"),
    ],
)
def test_a_template_without_end_is_ended(template: str, problem: str) -> None:
    bounds = {"max_seconds": 1, "max_memory_nbytes": 512 << 20, "max_size": 1_000_000}
    with Renderer(ChatTemplate(template), **bounds) as render:
        with pytest.raises(TokensError, match=problem):
            render(MESSAGES)
        with pytest.raises(TokensError, match=problem):
            render(MESSAGES)


def test_a_template_cannot_write_files_or_see_the_process(tmp_path: Path) -> None:
    for template in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ open('x', 'w') }}"):
        with Renderer(ChatTemplate(template)) as render, pytest.raises(TemplateError):
            render(MESSAGES)
    assert not list(tmp_path.iterdir())


def test_todays_date_is_refused_and_a_fixed_one_taken() -> None:
    given = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}"
    template = given + "{{ date_string }}"
    with (
        Renderer(ChatTemplate(template)) as render,
        pytest.raises(TokensError, match="today's date.*date_string"),
    ):
        render(MESSAGES)
    with Renderer(ChatTemplate(template, arguments={"date_string": "26 Jul"})) as render:
        assert render(MESSAGES) == "26 Jul"


def test_values_that_json_lacks_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with Renderer(ChatTemplate("x")) as render:
        for value in ({1, 2}, deep, b"bytes"):
            with pytest.raises(TokensError, match="a value that JSON does not have"):
                render([{"role": "user", "content": value}])


def test_the_process_ends_with_the_renderer() -> None:
    with Renderer(ChatTemplate("x")) as render:
        assert render(MESSAGES) == "x"
        process = render._process
        assert process is not None
        os.kill(process.pid, 0)
    assert process.poll() is not None
    started = time.perf_counter()
    render.close()
    assert time.perf_counter() - started < 1
