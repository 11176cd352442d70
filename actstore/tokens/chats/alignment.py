"""Finding in the text of a chat, to the character, what each of its messages says.

What a message says is rendered a second time between marks. If the text is the same but for the marks, they show where
it is: exactly, for any template, and in two or three renderings of a chat, however many messages it has. If it is not
the same, the template does something else than write it down, and that is an error. docs/design/018 has more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from actstore.errors import TokensError
from actstore.tokens.chats.chat import Message
from actstore.tokens.chats.marks import Bounds, Marks, Piece, pieces_of
from actstore.tokens.chats.renderer import Render, TemplateError

Span = tuple[int, int, int]
"""First character, the one behind the last, and the number of a message."""
_Side = tuple[int, Literal["lead", "tail"]]
"""The whitespace at one end of a piece, by its number."""
_MAX_RENDERINGS: Final = 1000


@dataclass(frozen=True)
class RenderedChat:
    """The text of a chat, and where its messages are in it."""

    text: str
    spans: tuple[Span, ...]
    """In the order of the text, none of them empty. What is between them is the template's."""


def align(messages: Sequence[Message], render: Render) -> RenderedChat:
    """Render a chat, and find its messages in the text.

    Raises:
        TokensError: the template refuses the chat, or writes what a message says in another form, twice, or not at all.
    """
    try:
        text = render(messages)
    except TemplateError as error:
        raise TokensError(f"the chat template refuses it: {error}") from error
    pieces = pieces_of(messages)
    if not pieces:
        return RenderedChat(text, ())
    found = _Search(messages, text, pieces, render).spans()
    return RenderedChat(text, tuple((start, stop, pieces[number].turn) for start, stop, number in found))


class _Search:
    def __init__(
        self, messages: Sequence[Message], text: str, pieces: Sequence[Piece], render: Render
    ) -> None:
        self._messages, self._text, self._pieces, self._render = messages, text, pieces, render
        self._marks = Marks(len(pieces), text, pieces)
        self._n_renderings = 0
        self._edges = [_edges(piece) for piece in pieces]
        self._kept: dict[_Side, int] = {}
        """Characters of whitespace that the template keeps at each end, next to the rest."""

    def spans(self) -> list[Span]:
        """Where the pieces are: start, stop and number of each."""
        whole = self._fit([_all_of(piece) for piece in self._pieces])
        if whole is not None:
            return whole
        # Templates trim: a mark outside of whitespace would keep them from it.
        sides: list[_Side] = [
            (number, end)
            for end in ("lead", "tail")
            for number, (lead, tail) in enumerate(self._edges)
            if (lead if end == "lead" else tail)
        ]
        if not sides or self._fit(self._bounds()) is None:
            raise self._misfit()
        by_role = sorted(
            sides, key=lambda side: (side[1], str(self._messages[self._pieces[side[0]].turn]["role"]))
        )
        self._settle(by_role)
        spans = self._fit(self._bounds())
        if spans is None:
            raise self._misfit()
        return [(start, stop, number) for start, stop, number in spans if start < stop]

    def _settle(self, sides: Sequence[_Side]) -> None:
        """Find how much whitespace the template keeps at these ends: mostly all of it, or none, at all of them."""
        lengths = {side: self._length(side) for side in sides}
        if self._fit(self._bounds(kept=lengths)) is not None:
            self._kept |= lengths
        elif self._fit(self._bounds(cut=sides)) is not None:
            self._kept |= dict.fromkeys(sides, 0)
        elif len(sides) > 1:
            self._settle(sides[: len(sides) // 2])
            self._settle(sides[len(sides) // 2 :])
        else:
            (side,) = sides
            for n in range(lengths[side] - 1, 0, -1):
                if self._fit(self._bounds(kept={side: n})) is not None:
                    self._kept[side] = n
                    return
            raise self._misfit()

    def _length(self, side: _Side) -> int:
        number, end = side
        return self._edges[number][end == "tail"]

    def _bounds(
        self, *, kept: "dict[_Side, int] | None" = None, cut: Sequence[_Side] = ()
    ) -> list[Bounds | None]:
        """Marks around each piece without the whitespace at its ends, but for what is kept there.

        Args:
            kept: characters of whitespace that go between the marks, beside those that are known to be kept.
            cut: ends whose whitespace is left out of the messages.
        """
        known, left_out = self._kept | (kept or {}), set(cut)
        made: list[Bounds | None] = []
        for number, (piece, (lead, tail)) in enumerate(zip(self._pieces, self._edges, strict=True)):
            if not piece.is_text:
                made.append(_all_of(piece))
                continue
            size = len(piece.value)
            start = lead - known.get((number, "lead"), 0)
            stop = size - tail + known.get((number, "tail"), 0)
            a = start if (number, "lead") in left_out else 0
            b = stop if (number, "tail") in left_out else size
            # Where only whitespace is there and none of it is kept, marks would make a text of nothing.
            made.append(Bounds(start, stop, a, b, is_marked=start < stop))
        return made

    def _fit(self, bounds: Sequence[Bounds | None]) -> list[Span] | None:
        self._n_renderings += 1
        if self._n_renderings > _MAX_RENDERINGS:
            raise TokensError(
                "the chat template trims whitespace here and there in so many ways that it cannot be found which of it "
                "is left; remove the whitespace at the ends of its messages"
            )
        marked = self._marked(bounds)
        return None if marked is None else self._marks.read(self._text, marked, self._pieces, bounds)

    def _marked(self, bounds: Sequence[Bounds | None]) -> str | None:
        try:
            return self._render(self._marks.put(self._messages, self._pieces, bounds))
        except TemplateError:
            return None

    def _misfit(self) -> TokensError:
        """What cannot be found, as an error."""
        core = self._bounds()
        numbers = [number for number, part in enumerate(core) if part is not None and part.is_marked]
        while len(numbers) > 1:
            half = numbers[: len(numbers) // 2]
            others = numbers[len(numbers) // 2 :]
            numbers = next((part for part in (half, others) if self._alone(core, part) is None), [])
        what = "what its messages say"
        how = "writes {} in another form"
        if numbers:
            what = self._pieces[numbers[0]].name
            only = [part if number == numbers[0] else None for number, part in enumerate(core)]
            n = self._marks.seen(self._marked(only) or "", numbers[0])
            how = "leaves out {}, or a part of it" if n == 0 else "writes {} more than once" if n > 1 else how
        return TokensError(
            f"the chat template {how.format(what)}, so the text does not show which tokens are whose; change the "
            "message, or give a template that writes messages as they are (chat_template)"
        )

    def _alone(self, bounds: Sequence[Bounds | None], numbers: Sequence[int]) -> list[Span] | None:
        chosen = set(numbers)
        return self._fit([part if number in chosen else None for number, part in enumerate(bounds)])


def _all_of(piece: Piece) -> Bounds:
    size = len(piece.value) if piece.is_text else 0
    return Bounds(0, size, 0, size)


def _edges(piece: Piece) -> tuple[int, int]:
    """The characters of whitespace at either end; if there is nothing else, all of it is at the beginning."""
    if not piece.is_text:
        return 0, 0
    text: str = piece.value
    lead = len(text) - len(text.lstrip())
    return lead, 0 if lead == len(text) else len(text) - len(text.rstrip())
