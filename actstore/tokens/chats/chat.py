"""A chat: messages with roles, checked where it is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from actstore.errors import TokensError

TEMPLATE: Final = 0
"""Role of the text that the template writes itself."""
PADDING: Final = -1
"""Role of padding."""
NO_TURN: Final = -1
"""Turn of what belongs to no message."""
ROLES: Final[Mapping[str, int]] = {"template": TEMPLATE, "system": 1, "user": 2, "assistant": 3, "tool": 4}
"""Numbers of the roles in the array ``roles``."""
_ALIASES: Final = {"developer": "system", "function": "tool", "ipython": "tool"}
REASONING: Final = ("reasoning_content", "thinking", "reasoning")
"""Names of the field with the reasoning of a message. As in transformers, the first that is given counts."""
_MESSAGE_SIZE: Final = 16
"""About as many characters as a template writes around a message."""

Message = dict[str, Any]
ChatBatch = tuple[int, "list[Chat]"]
"""The number of the first chat, and the chats from there on, without gaps."""


@dataclass(frozen=True)
class Chat:
    """The messages of one document. An empty chat is an empty document."""

    messages: tuple[Message, ...]
    """The messages without fields that are None, as transformers gives them to a template."""
    where: str
    """Where the chat is from, for messages of errors."""

    def __len__(self) -> int:
        """About as many characters as it has."""
        return sum(_MESSAGE_SIZE + _size(message) for message in self.messages)


def role_number(message: Message) -> int:
    """The number of the role of a message that was checked."""
    role = str(message["role"])
    return ROLES[_ALIASES.get(role, role)]


def chat_of(value: object, where: str) -> Chat:
    """Check the value of a column of chats; null is an empty chat.

    Args:
        value: list of messages, each with a ``role`` and, mostly, a ``content``: a string, or a list of text parts.
        where: where the value is from, such as ``messages in line 3 of chats.jsonl``.

    Raises:
        TokensError: it is no list of messages.
    """
    if value is None:
        return Chat((), where)
    if not isinstance(value, list | tuple):
        raise TokensError(f"{where} is a {type(value).__name__}, not a list of messages")
    return Chat(
        tuple(_message(message, f"message {number} of {where}") for number, message in enumerate(value)),
        where,
    )


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise TokensError(f"{where} is a {type(value).__name__}, not an object with role and content")
    message = {key: field for key, field in value.items() if field is not None}
    role = message.get("role")
    if not isinstance(role, str) or _ALIASES.get(role, role) not in ROLES or role == "template":
        known = ", ".join([*list(ROLES)[1:], *_ALIASES])
        keys = "" if "role" in message else f" (its fields are: {', '.join(map(str, message)) or 'none'})"
        raise TokensError(f"the role of {where} is {role!r}{keys}; it can be {known}")
    if isinstance(content := message.get("content"), list | tuple):
        message["content"] = [_part(part, where) for part in content]
    for name in ("content", *REASONING):
        field = message.get(name, "")
        if not isinstance(field, str) and not (name == "content" and isinstance(field, list)):
            raise TokensError(f"{name} of {where} is a {type(field).__name__}, not a string")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where)
    return message


def _part(part: object, where: str) -> Message:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise TokensError(
            f"content of {where} has a part of type {kind!r}; only text parts can be stored, such as "
            "{'type': 'text', 'text': 'Hello'}"
        )
    return {"type": "text", "text": part["text"]}


def _calls(calls: object, where: str) -> list[Message]:
    if not isinstance(calls, list | tuple):
        raise TokensError(f"tool_calls of {where} is a {type(calls).__name__}, not a list")
    checked = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TokensError(
                f"a tool call of {where} has no name; write it as "
                "{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}"
            )
        checked.append({key: field for key, field in call.items() if field is not None})
    return checked


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 1
