"""What a user gave, in a few words of one line, for messages."""

import reprlib

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def quoted(given: object) -> str:
    """Its repr, cut in the middle where it is long; of a tensor or an array, its dtype and shape."""
    shape = getattr(given, "shape", None)
    if shape is not None and hasattr(given, "dtype"):
        return f"{type(given).__name__} of {given.dtype} and shape {tuple(shape)}"
    return " ".join(_short.repr(given).split())
