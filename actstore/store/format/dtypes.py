"""The element types of a store, and the NumPy types that carry their bytes.

NumPy has no bfloat16, so its bytes are handled as unsigned 16-bit integers; values are never converted.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from actstore.errors import JobError


@dataclass(frozen=True)
class DType:
    """An element type: its Zarr v3 name, its size, and the NumPy type that carries its bytes."""

    name: str
    storage: np.dtype[Any]
    """The little-endian NumPy type with the same bytes."""
    fill_value: int | str
    """What other readers show for rows that were never committed: conspicuous, never a plausible zero."""

    @property
    def itemsize(self) -> int:
        return self.storage.itemsize


_TYPES: Final = {
    t.name: t
    for t in (
        DType("bfloat16", np.dtype("<u2"), "NaN"),
        DType("float16", np.dtype("<f2"), "NaN"),
        DType("float32", np.dtype("<f4"), "NaN"),
        DType("int8", np.dtype("i1"), -1),
        DType("int32", np.dtype("<i4"), -1),
        DType("int64", np.dtype("<i8"), -1),
    )
}


def dtype(name: str) -> DType:
    """Look up a type by its Zarr name.

    Raises:
        JobError: the store format has no such type.
    """
    try:
        return _TYPES[name]
    except KeyError:
        raise JobError(f"dtype {name!r} is not supported; choose one of {', '.join(_TYPES)}") from None
