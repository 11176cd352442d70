"""Shortening foreign error texts to one line that fits into a sentence."""

from typing import Final

_LONGEST: Final = 300
"""The most characters of a reason: some libraries put whole files into their errors."""


def reason(error: BaseException | str) -> str:
    """The first meaningful line of an error's text, without its full stop, or the name of its class.

    A line that ends in a colon is joined with the next one.
    """
    # The whole text of an OSError repeats the path, which the message around it names.
    if isinstance(error, OSError) and error.strerror:
        error = error.strerror
    # The text of a KeyError is the repr of its argument, in which line ends are escaped.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = [" ".join(line.split()) for line in str(text).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
    return first if len(first) <= _LONGEST else f"{first[:_LONGEST]}..."
