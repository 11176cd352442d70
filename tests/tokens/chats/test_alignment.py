"""Where messages are in the text, compared with texts that are built by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actstore.errors import TokensError
from actstore.tokens.chats.alignment import RenderedChat, align
from actstore.tokens.chats.renderer import Render
from tests.tokens.chats.shapes import CHATML, GEMMA, LLAMA, MISTRAL, QWEN, SHAPES, Parts, text_of, turns_of
from tests.tokens.chats.strategies import alternating, with_tools

Rendering = Callable[..., Render]
MANY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def turns(rendered: RenderedChat) -> list[int]:
    """The message of each character."""
    values = [-1] * len(rendered.text)
    for start, stop, turn in rendered.spans:
        values[start:stop] = [turn] * (stop - start)
    return values


def check(rendered: RenderedChat, parts: Parts) -> None:
    assert rendered.text == text_of(parts)
    assert turns(rendered) == turns_of(parts)
    starts = [start for start, _, _ in rendered.spans]
    assert starts == sorted(starts)
    assert all(start < stop for start, stop, _ in rendered.spans)


@pytest.mark.parametrize("shape", SHAPES)
@MANY
@given(messages=alternating(), prompt=st.booleans())
def test_any_chat_is_found_to_the_character(
    rendering: Rendering, shape: str, messages: list[dict[str, Any]], prompt: bool
) -> None:
    render = rendering(SHAPES[shape].template, add_generation_prompt=prompt)
    is_left_out = messages[0]["role"] == "system" and messages[-1]["role"] == "assistant"
    if shape == "mistral" and is_left_out and messages[0]["content"].strip():
        with pytest.raises(TokensError, match="leaves out content of message 0"):
            align(messages, render)
        return
    check(align(messages, render), SHAPES[shape].build(messages, prompt=prompt))


TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather ☀", "parameters": {}}}
]


@MANY
@given(messages=with_tools(), tools=st.sampled_from([None, TOOLS]))
def test_tools_calls_and_reasoning_are_found(
    rendering: Rendering, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    check(align(messages, rendering(QWEN, tools=tools)), SHAPES["qwen"].build(messages, tools=tools))


def test_the_name_and_the_arguments_of_a_call_are_the_assistants(rendering: Rendering) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": 'Köln "am" Rhein', "days": 3}}}
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "tool_calls": [call]}]
    rendered = align(messages, rendering(QWEN))
    said = [rendered.text[start:stop] for start, stop, turn in rendered.spans if turn == 1]
    assert said == ["get_weather", '{"city": "Köln \\"am\\" Rhein", "days": 3}']


def test_contents_in_parts_are_found(rendering: Rendering) -> None:
    template = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    parts: Any = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    rendered = align([{"role": "user", "content": parts}], rendering(template))
    assert (rendered.text, rendered.spans) == ("<one ><two>", ((1, 5, 0), (7, 10, 0)))


@pytest.mark.parametrize(
    ("kept", "template"),
    [
        (" \n hi \n", "{{ m.content }}"),
        (" hi", "{{ m.content.lstrip('\\n ').rstrip() if false else m.content.strip('\\n') }}"),
        ("hi", "{{ m.content | trim }}"),
        (" \n hi", "{{ m.content.rstrip() }}"),
        ("hi \n", "{{ m.content.lstrip() }}"),
    ],
)
def test_whitespace_that_a_template_keeps_is_the_messages(
    rendering: Rendering, kept: str, template: str
) -> None:
    content = "\n hi\n" if kept == " hi" else " \n hi \n"
    template = "{% for m in messages %}{{ ' \\n' }}" + template + "{{ ' \\n ' }}{% endfor %}"
    rendered = align([{"role": "user", "content": content}], rendering(template))
    ((start, stop, _),) = rendered.spans
    assert rendered.text == f" \n{kept} \n "
    assert (start, rendered.text[start:stop]) == (2, kept)


def test_whitespace_that_only_some_messages_keep_is_found_in_few_renderings(rendering: Rendering) -> None:
    template = (
        "{% for m in messages %}<{{ m.content | trim if m.role == 'user' else m.content }}>{% endfor %}"
    )
    render, n_renderings = rendering(template), 0

    def counted(messages: Sequence[dict[str, Any]]) -> str:
        nonlocal n_renderings
        n_renderings += 1
        return render(messages)

    messages = [{"role": role, "content": f" {role} "} for role in ("user", "assistant")] * 50
    rendered = align(messages, counted)
    assert [rendered.text[start:stop] for start, stop, _ in rendered.spans] == ["user", " assistant "] * 50
    assert n_renderings < 20


def test_a_long_chat_takes_two_renderings(rendering: Rendering) -> None:
    render, n_renderings = rendering(CHATML), 0

    def counted(messages: Sequence[dict[str, Any]]) -> str:
        nonlocal n_renderings
        n_renderings += 1
        return render(messages)

    messages = [
        {"role": role, "content": f"{number}"} for number in range(50) for role in ("user", "assistant")
    ]
    check(align(messages, counted), SHAPES["chatml"].build(messages))
    assert n_renderings == 2


USER = {"role": "user", "content": "What?"}
THOUGHT = {"role": "assistant", "content": "<think>Well.</think>That."}
PYTHON_CALLS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
    "{{ c.function.arguments | string }}{% endfor %}{% endfor %}"
)
CALL = {"function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (QWEN, [USER, THOUGHT, USER], r"leaves out content of message 1, or a part of it"),
        (
            QWEN,
            [USER, {"role": "assistant", "content": "That.", "reasoning_content": "Well."}, USER],
            r"leaves out reasoning_content of message 1",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            [{"role": "user", "content": "1"}, USER],
            r"writes content of message 1 in another form",
        ),
        (
            "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
            [USER, {"role": "tool", "content": 'a "quoted" word'}],
            r"writes content of message 1 in another form",
        ),
        (
            "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}",
            [USER],
            r"writes content of message 0 more than once",
        ),
        ("{{ messages[-1].content }}", [USER, {"role": "user", "content": "no"}], r"leaves out content of message 0"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", [USER], r"leaves out content of message 0"),
        (
            "{% for m in messages %}{{ m.content | replace('  ', ' ') }}{% endfor %}",
            [USER, {"role": "user", "content": "two  spaces"}],
            r"writes content of message 1 in another form",
        ),
        (
            PYTHON_CALLS,
            [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            r"writes tool_calls\[0\].function.arguments of message 1 in another form",
        ),
        (CHATML, [USER, {"role": "assistant", "content": "x", "tool_calls": [CALL]}], r"leaves out tool_calls\[0\]"),
        (MISTRAL, [USER, USER], r"the chat template refuses it: .*roles must alternate"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_write_as_it_is_is_an_error(
    rendering: Rendering, template: str, messages: list[dict[str, Any]], problem: str
) -> None:
    with pytest.raises(TokensError, match=problem):
        align(messages, rendering(template))


def test_stock_templates_have_no_assistant_mask_of_their_own(tokenizer: Any, rendering: Rendering) -> None:
    messages = [USER, {"role": "assistant", "content": "That."}]
    for template in (CHATML, LLAMA, GEMMA):
        mask = tokenizer.apply_chat_template(
            messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )["assistant_masks"]
        assert not any(mask)
        assert 1 in turns(align(messages, rendering(template)))
