"""Marks around what messages say: characters that no text has, by which it is found again in the rendered text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Final

from actstore.errors import TokensError
from actstore.tokens.chats.chat import REASONING, Message

_PLANES: Final = ((0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))
"""Private use characters: no letters, no space, and in no text but by agreement."""
_FIRST: Final = chr(_PLANES[0][0])


@dataclass(frozen=True)
class Piece:
    """A value in a message that the template writes: a string, or the arguments of a tool call."""

    turn: int
    path: tuple[str | int, ...]
    """Where it is in the message."""
    value: Any

    @property
    def is_text(self) -> bool:
        return isinstance(self.value, str)

    @property
    def name(self) -> str:
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return f"{field.removeprefix('.')} of message {self.turn}"


def pieces_of(messages: Sequence[Message]) -> list[Piece]:
    """What the messages say: contents, reasoning, and names and arguments of tool calls; nothing that is empty."""
    return [
        Piece(turn, path, value)
        for turn, message in enumerate(messages)
        for path, value in _values(message)
        if value != ""
    ]


def _values(message: Message) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    for name in REASONING:
        if name in message:
            yield (name,), message[name]
            break
    content = message.get("content", "")
    if isinstance(content, str):
        yield ("content",), content
    else:
        yield from ((("content", number, "text"), part["text"]) for number, part in enumerate(content))
    for number, call in enumerate(message.get("tool_calls", ())):
        path: tuple[str | int, ...] = ("tool_calls", number)
        if "function" in call:
            path, call = (*path, "function"), call["function"]
        yield (*path, "name"), call["name"]
        if call.get("arguments") is not None:
            yield (*path, "arguments"), call["arguments"]


@dataclass(frozen=True)
class Bounds:
    """What becomes of a piece: ``text[a:b]`` stays in the message, and of that, ``text[start:stop]`` is marked."""

    start: int
    stop: int
    a: int
    b: int
    is_marked: bool = True


class Marks:
    """Two characters for each piece, which occur in no text."""

    def __init__(self, n_pieces: int, text: str, pieces: Sequence[Piece]) -> None:
        """
        Args:
            n_pieces: the number of pairs.
            text: the rendered text without marks.
            pieces: the pieces, which may have characters that the text does not have.

        Raises:
            TokensError: the text leaves too few characters that it does not have.
        """
        self._base = _free_run(2 * n_pieces, {text, *(piece.value for piece in pieces if piece.is_text)})
        first, last = re.escape(chr(self._base)), re.escape(chr(self._base + 2 * n_pieces - 1))
        self._split = re.compile(f"([{first}-{last}])")

    def put(
        self, messages: Sequence[Message], pieces: Sequence[Piece], bounds: Sequence[Bounds | None]
    ) -> list[Message]:
        """The messages with marks around pieces; those without bounds are left as they are."""
        marked = list(messages)
        numbered = enumerate(zip(pieces, bounds, strict=True))
        for turn, group in groupby(numbered, lambda numbered: numbered[1][0].turn):
            message: Any = marked[turn]
            for number, (piece, part) in group:
                if part is not None:
                    message = _replaced(message, piece.path, self._marked(number, piece, part))
            marked[turn] = message
        return marked

    def _marked(self, number: int, piece: Piece, part: Bounds) -> str:
        first, last = chr(self._base + 2 * number), chr(self._base + 2 * number + 1)
        if not piece.is_text:
            return first + last
        text: str = piece.value
        if not part.is_marked:
            return text[part.a : part.b]
        return (
            text[part.a : part.start] + first + text[part.start : part.stop] + last + text[part.stop : part.b]
        )

    def read(
        self, text: str, marked: str, pieces: Sequence[Piece], bounds: Sequence[Bounds | None]
    ) -> list[tuple[int, int, int]] | None:
        """Where the marked pieces are in the text.

        Args:
            text: the rendered text without marks.
            marked: the rendered text with marks.
            pieces: the pieces.
            bounds: which parts of them were marked.

        Returns:
            Start, stop and number of each piece, in the order of the text. None unless the marked text is the text but
            for the marks, with each piece once and as it is in its message.
        """
        parts = self._split.split(marked)
        plain, found = parts[::2], [ord(mark) - self._base for mark in parts[1::2]]
        marked_pieces = (number for number, part in enumerate(bounds) if part is not None and part.is_marked)
        expected = {mark for number in marked_pieces for mark in (2 * number, 2 * number + 1)}
        if len(found) != len(expected) or set(found) != expected:
            return None
        if any(
            first % 2 or second != first + 1 for first, second in zip(found[::2], found[1::2], strict=True)
        ):
            return None
        _unquote(plain, found, pieces)
        at, spans = 0, []
        for index, part_text in enumerate(plain):
            if not text.startswith(part_text, at):
                return None
            start, at = at, at + len(part_text)
            if index % 2:  # behind a first mark
                number = found[index - 1] // 2
                end = _end_of(pieces[number], bounds[number], text, start, at)
                if end is None:
                    return None
                spans.append((start, end, number))
                at = end
        return spans if at == len(text) else None

    def seen(self, marked: str, number: int) -> int:
        """How often both marks of a piece are in a text; 0 if one of them is not there."""
        first, last = chr(self._base + 2 * number), chr(self._base + 2 * number + 1)
        return min(marked.count(first), marked.count(last))


def _end_of(piece: Piece, part: Bounds | None, text: str, start: int, at: int) -> int | None:
    """Where a piece ends that starts there; None if the text there is not what the message says."""
    if piece.is_text:
        assert part is not None
        return at if text[start:at] == piece.value[part.start : part.stop] else None
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return end if value == piece.value else None


def _unquote(plain: list[str], found: Sequence[int], pieces: Sequence[Piece]) -> None:
    """Remove the quotes around arguments: as JSON, the two marks in their place are a string."""
    for index in range(1, len(plain), 2):
        if not pieces[found[index - 1] // 2].is_text and plain[index - 1][-1:] == '"' == plain[index + 1][:1]:
            plain[index - 1], plain[index + 1] = plain[index - 1][:-1], plain[index + 1][1:]


def _replaced(value: Any, path: Sequence[str | int], text: str) -> Any:
    if not path:
        return text
    inner = _replaced(value[path[0]], path[1:], text)
    if isinstance(value, Mapping):
        return {**value, path[0]: inner}
    copy = list(value)
    copy[path[0]] = inner  # type: ignore[index]
    return copy


def _free_run(n: int, texts: set[str]) -> int:
    """The first of n successive private characters that are in none of the texts."""
    used = {ord(c) for text in texts if max(text, default="") >= _FIRST for c in text if c >= _FIRST}
    for first, end in _PLANES:
        taken = sorted(code for code in used if first <= code < end)
        for before, after in pairwise([first - 1, *taken, end]):
            if after - before > n:
                return before + 1
    raise TokensError(
        f"a chat has {n // 2:,} contents and tool calls, too many to tell apart; split it into several chats"
    )
