"""Chats for hypothesis: text that looks like templates, whitespace at its ends, emoji, and nothing at all."""

from typing import Any

from hypothesis import strategies as st

_FRAGMENTS = [
    "a", "Hello", "two words", ".", "\n", "\n\n", " ", "\t", "  ", "\u00a0", "é", "日本", "😀", "👩🏽‍🚀", "e\u0301",
    "<|im_end|>", "<|im_start|>user\n", "[INST]", " [/INST]", "<eos>", "<bos>", "{{ messages }}", "{% if %}",
    '"', "\\n", "<end_of_turn>", "<|eot_id|>", "\U000f0000", "\U0010fffd", "\ue000", "<tool_call>", "0",
]  # fmt: skip

text = st.lists(st.sampled_from(_FRAGMENTS), max_size=6).map("".join)
"""Contents without ``</think>``, which Qwen's template takes for reasoning."""
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.sampled_from([0.5, -1e-7]) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(text, _json, max_size=3)


@st.composite
def alternating(draw: Any, max_turns: int = 6) -> list[dict[str, Any]]:
    """User and assistant in turn, sometimes behind a system message."""
    roles = ["user", "assistant"] * (max_turns // 2)
    n = draw(st.integers(1, max_turns))
    system = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    return [*system, *({"role": role, "content": draw(text)} for role in roles[:n])]


@st.composite
def with_tools(draw: Any) -> list[dict[str, Any]]:
    """A user's question, calls of tools, their answers, and a last answer with reasoning."""
    system = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    names = draw(st.lists(st.sampled_from(["get_weather", "f", "über"]), min_size=1, max_size=3))
    calls = [
        {"type": "function", "function": {"name": name, "arguments": draw(arguments | st.just('{"a": 1}'))}}
        for name in names
    ]
    messages = [*system, {"role": "user", "content": draw(text)}]
    messages.append({"role": "assistant", "content": draw(text), "tool_calls": calls})
    messages += [{"role": "tool", "content": draw(text)} for _ in names]
    answer = {"role": "assistant", "content": draw(text)}
    if draw(st.booleans()):
        answer["reasoning_content"] = draw(text)
    return [*messages, answer] if draw(st.booleans()) else messages
