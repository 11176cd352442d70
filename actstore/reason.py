"""What foreign text says, in one line that a sentence of ours can hold."""

from typing import Final

_LONGEST: Final = 300
"""Characters; some libraries put whole files into their errors."""


def reason(error: BaseException | str) -> str:
    """The first line that says something of an error's text, without its full stop; else the name of its class.

    A line that ends in a colon has the next one with it.
    """
    # The whole text of an OSError repeats the path, which the message around it names.
    if isinstance(error, OSError) and error.strerror:
        error = error.strerror
    # A KeyError's text is the repr of its argument, with line ends spelled out.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = [" ".join(line.split()) for line in str(text).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
    return first if len(first) <= _LONGEST else f"{first[:_LONGEST]}..."
