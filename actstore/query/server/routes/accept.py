"""Chooses the format of a reply by the header ``Accept``, as RFC 9110 says."""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from actstore.query.problem import Problem
from actstore.query.server.sending.formats import MEDIA

Format = Literal["raw", "safetensors", "npy", "arrow", "json"]
_SLICES: Final[tuple[Format, ...]] = ("raw", "safetensors", "npy", "arrow", "json")


class _Range(NamedTuple):
    """What one range of ``Accept`` says of a media type. The greatest of several counts, as it is the most specific."""

    specificity: int
    """2 for the media type itself, 1 for ``application/*``, 0 for ``*/*``."""
    quality: float
    """0 where the type is excluded."""
    order: int
    """0 for the first range of the header, then -1, -2, ..."""


def slice_format(requested: Format | None, accept: str | None) -> Format:
    """The format of a slice: the one in the query, or the one that ``Accept`` prefers.

    Raises:
        Problem: ``Accept`` allows no format that the server has.
    """
    preferred = requested or preferred_format(accept, _SLICES)
    if preferred is None:
        raise not_acceptable(accept, _SLICES)
    return preferred


def not_acceptable(accept: str | None, offered: Sequence[Format]) -> Problem:
    """The error for a request whose ``Accept`` allows none of the offered formats."""
    types = ", ".join(MEDIA[name] for name in offered)
    return Problem(406, "not-acceptable", f"accepted is {(accept or '')[:100]!r}; there are {types}")


def preferred_format(accept: str | None, offered: Sequence[Format]) -> Format | None:
    """The offered format of the highest quality; None if ``Accept`` allows none of them.

    Of equals, it is the one that the header names first, then the one that is offered first.
    """
    ranges = _ranges(accept)
    matches = [(_range_of(ranges, MEDIA[name]), name) for name in offered]
    allowed = [(match.quality, match.order, name) for match, name in matches if match and match.quality]
    return max(allowed, key=lambda choice: choice[:2], default=(0, 0, None))[2]


def names_any(accept: str | None, formats: Sequence[Format]) -> bool:
    """Whether ``Accept`` says anything of these formats, be it that they are not wanted."""
    ranges = _ranges(accept)
    return any(_range_of(ranges, MEDIA[name]) is not None for name in formats)


def _ranges(accept: str | None) -> list[tuple[str, float]]:
    """The media ranges of the header, in lower case, and the quality of each. No header accepts everything."""
    ranges = []
    for media_range in (accept or "*/*").split(","):
        media, *parameters = (part.strip().lower() for part in media_range.split(";"))
        quality = next((_quality(parameter) for parameter in parameters if parameter.startswith("q=")), 1.0)
        ranges.append((media, quality))
    return ranges


def _range_of(ranges: list[tuple[str, float]], media: str) -> _Range | None:
    """The most specific of the ranges that match a media type; None if none does."""
    patterns = ("*/*", f"{media.partition('/')[0]}/*", media)
    matches = [
        _Range(patterns.index(pattern), quality, -place)
        for place, (pattern, quality) in enumerate(ranges)
        if pattern in patterns
    ]
    return max(matches, default=None)


def _quality(parameter: str) -> float:
    try:
        return max(0.0, float(parameter.removeprefix("q=")))  # of NaN this is 0
    except ValueError:
        return 1.0
