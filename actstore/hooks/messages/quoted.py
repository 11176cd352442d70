"""Short descriptions of what a user gave, for error messages."""

import reprlib

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def quoted(given: object) -> str:
    """The repr of a value on one line, cut in the middle if it is long; of a tensor or array, its dtype and shape."""
    shape = getattr(given, "shape", None)
    if shape is not None and hasattr(given, "dtype"):
        return f"{type(given).__name__} of {given.dtype} and shape {tuple(shape)}"
    return " ".join(_short.repr(given).split())
