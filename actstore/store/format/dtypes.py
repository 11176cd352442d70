"""The element types a store holds, and how their bytes are seen by NumPy.

NumPy has no bfloat16, so its bytes travel as unsigned 16-bit integers; nothing is ever cast on the way.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from actstore.errors import JobError


@dataclass(frozen=True)
class DType:
    """One element type: its Zarr v3 name, its size, and the NumPy type that carries its bytes."""

    name: str
    storage: np.dtype[Any]
    """Little-endian NumPy type with the same bytes."""
    fill_value: int | str
    """What a foreign reader shows for rows that were never committed: loud, never a plausible zero."""

    @property
    def itemsize(self) -> int:
        return self.storage.itemsize


_TYPES: Final = {
    t.name: t
    for t in (
        DType("bfloat16", np.dtype("<u2"), "NaN"),
        DType("float16", np.dtype("<f2"), "NaN"),
        DType("float32", np.dtype("<f4"), "NaN"),
        DType("int32", np.dtype("<i4"), -1),
        DType("int64", np.dtype("<i8"), -1),
    )
}


def dtype(name: str) -> DType:
    """Look a type up by its Zarr name.

    Raises:
        JobError: the store format has no such type.
    """
    try:
        return _TYPES[name]
    except KeyError:
        raise JobError(f"dtype {name!r} is not supported; choose one of {', '.join(_TYPES)}") from None
