"""Choosing the positions of packed sequences whose activations are stored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError, TokensError
from actstore.tokens.chats.chat import ROLES

_FORMS: Final = (
    "all, last, last:K, A:B, every:K, sample:K, role:NAME, role:NAME:last, after:TEXT or column:NAME"
)

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Some packed sequences, [n, L], and what positions of them can be chosen by."""

    lengths: NDArray[np.int32]
    """Real tokens of each sequence, [n]."""
    documents: NDArray[np.int64]
    offsets: NDArray[np.int32]
    roles: NDArray[np.int8] | None = None
    """Roles of tokens as in `ROLES`, [n, L]; None if documents are no chats."""
    starts: Mapping[int, int] | None = None
    """By document, the offset of its first token behind the text of ``after:TEXT``; none for documents without it."""
    listed: Mapping[int, Sequence[int]] | None = None
    """By document, its positions in the column of ``column:NAME``."""
    seed: int = 0
    """Seed of ``sample:K``."""

    @property
    def is_real(self) -> Mask:
        """False for padding, [n, L]."""
        return self.numbers < self.lengths[:, None]

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The positions of a sequence, [L]."""
        return np.arange(self.documents.shape[1])


@dataclass(frozen=True)
class Span:
    """``A:B``: a slice of the real tokens of each sequence, as Python slices a list. ``last:K`` is ``-K:``."""

    start: int
    stop: int | None

    def __str__(self) -> str:
        if self.start < 0 and self.stop is None:
            return "last" if self.start == -1 else f"last:{-self.start}"
        return f"{self.start}:{'' if self.stop is None else self.stop}"

    def mask(self, sequences: Sequences) -> Mask:
        lengths = sequences.lengths.astype(np.int64)[:, None]

        def edge(place: int) -> NDArray[np.int64]:
            return np.clip(place + lengths if place < 0 else np.full_like(lengths, place), 0, lengths)

        stop = lengths if self.stop is None else edge(self.stop)
        return (sequences.numbers >= edge(self.start)) & (sequences.numbers < stop)


@dataclass(frozen=True)
class Every:
    """``every:K``: positions 0, K, 2 K, ..."""

    step: int

    def __str__(self) -> str:
        return f"every:{self.step}"

    def mask(self, sequences: Sequences) -> Mask:
        mask: Mask = sequences.is_real & (sequences.numbers % self.step == 0)
        return mask


@dataclass(frozen=True)
class Sample:
    """``sample:K``: K tokens of documents, drawn from each sequence without repetition; all if it has fewer.

    Each token has a number that is drawn from the seed, its document and its offset there alone, and the lowest win. So
    the same tokens are drawn however often and wherever a text is packed. Inserted tokens are never drawn.
    """

    size: int

    def __str__(self) -> str:
        return f"sample:{self.size}"

    def mask(self, sequences: Sequences) -> Mask:
        can_be_drawn = sequences.documents >= 0
        seed = np.full((), sequences.seed & (2**64 - 1), np.uint64)
        drawn = _mixed(_mixed(_mixed(seed) ^ _unsigned(sequences.documents)) ^ _unsigned(sequences.offsets))
        # By both: an inserted token must come last, even after the largest number.
        order = np.lexsort((drawn, ~can_be_drawn), axis=1)[:, : self.size]
        mask: Mask = np.zeros(can_be_drawn.shape, dtype=bool)
        np.put_along_axis(mask, order, values=True, axis=1)
        return mask & can_be_drawn


@dataclass(frozen=True)
class Role:
    """``role:NAME``: the tokens of one role in a chat; with ``:last``, the last of them in each sequence."""

    name: str
    is_last: bool

    def __str__(self) -> str:
        return f"role:{self.name}" + (":last" if self.is_last else "")

    def mask(self, sequences: Sequences) -> Mask:
        if sequences.roles is None:
            raise JobError(
                f"positions {self} need chats, or token ids with token_roles, and these documents are none; choose "
                "other positions"
            )
        mask: Mask = sequences.roles == ROLES[self.name]
        if self.is_last:
            behind = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]  # tokens of the role from here on
            mask &= behind == 1
        return mask


@dataclass(frozen=True)
class After:
    """``after:TEXT``: the tokens of a document behind the last place where it has a text.

    The first of them is the first token that holds a character behind it. Documents without the text have none.
    """

    text: str

    def __str__(self) -> str:
        return f"after:{self.text}"

    def mask(self, sequences: Sequences) -> Mask:
        if sequences.starts is None:
            raise JobError(
                f"positions {str(self)!r} need text, and these documents are token ids; give the text"
            )
        numbers, where = np.unique(sequences.documents, return_inverse=True)
        nowhere = np.iinfo(np.int64).max
        starts = np.array([sequences.starts.get(number, nowhere) for number in numbers.tolist()], np.int64)
        is_own = sequences.documents >= 0
        mask: Mask = is_own & (sequences.offsets >= starts[where.reshape(sequences.documents.shape)])
        return mask


@dataclass(frozen=True)
class Column:
    """``column:NAME``: the positions that a column of the source lists for each document.

    They count the tokens of the sequence, inserted ones included, and from its end where negative. A position that is
    listed twice is stored once.
    """

    name: str

    def __str__(self) -> str:
        return f"column:{self.name}"

    def mask(self, sequences: Sequences) -> Mask:
        if sequences.listed is None:
            raise JobError(f"positions {self} need a table with that column; choose other positions")
        mask = np.zeros(sequences.documents.shape, dtype=bool)
        for row, (length, document) in enumerate(
            zip(sequences.lengths.tolist(), sequences.documents.max(axis=1).tolist(), strict=True)
        ):
            for position in sequences.listed.get(document, ()):
                if not -length <= position < length:
                    raise TokensError(
                        f"column {self.name} lists position {position} for document {document}, which has {length} "
                        f"tokens; list positions from {-length} to {length - 1}"
                    )
                mask[row, position % length] = True
        return mask


Selection = Span | Every | Sample | Role | After | Column


def parse_positions(text: str) -> Selection | None:
    """The selection that a text means; None for all positions. ``str`` of it is its canonical spelling.

    Raises:
        JobError: the text means none.
    """
    if text == "all":
        return None
    kind, colon, rest = text.partition(":")
    parse = _PARSERS.get(kind)
    try:
        if parse is not None:
            return parse(rest if colon else None)
        if colon:
            start, stop = (int(part) if part.strip() else None for part in (kind, rest))
            return None if not start and stop is None else Span(start or 0, stop)
    except ValueError:
        pass
    raise JobError(f"positions is {text!r}; it can be {_FORMS}")


def _last(rest: str | None) -> Selection:
    return Span(-1 if rest is None else -_positive(rest), None)


def _every(rest: str | None) -> Selection | None:
    step = _positive(rest)
    return None if step == 1 else Every(step)


def _sample(rest: str | None) -> Selection:
    return Sample(_positive(rest))


def _role(rest: str | None) -> Selection:
    name, colon, which = (rest or "").partition(":")
    if name not in ROLES or (colon and which != "last"):
        raise ValueError(rest)
    return Role(name, bool(colon))


def _after(rest: str | None) -> Selection:
    return After(_some(rest))


def _column(rest: str | None) -> Selection:
    return Column(_some(rest))


_PARSERS: Final[Mapping[str, Callable[[str | None], Selection | None]]] = {
    "last": _last,
    "every": _every,
    "sample": _sample,
    "role": _role,
    "after": _after,
    "column": _column,
}


def _positive(text: str | None) -> int:
    number = int(text or "")
    if number < 1:
        raise ValueError(text)
    return number


def _some(text: str | None) -> str:
    if not text:
        raise ValueError(text)
    return text


def slots(mask: Mask) -> NDArray[np.int32]:
    """The positions where a mask [n, L] is true: [n, the most of any row], ascending, then -1."""
    counts = mask.sum(axis=1)
    positions = np.full((len(mask), counts.max(initial=0)), -1, np.int32)
    positions[np.arange(positions.shape[1]) < counts[:, None]] = np.nonzero(mask)[1]
    return positions


def _unsigned(numbers: NDArray[np.integer]) -> NDArray[np.uint64]:
    return numbers.astype(np.int64).view(np.uint64)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A number drawn from each number, as in SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
