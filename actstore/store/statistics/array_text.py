"""Arrays of float64 as text for JSON documents: base64 of the little-endian numbers."""

import base64
import binascii
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.reason import reason

LARGEST: Final = 1e120
"""The largest number that a record may hold. Sums of squares of float32 values stay far below it, and adding up records
cannot overflow.
"""


def encoded(values: NDArray[np.float64]) -> str:
    """The base64 text of an array; its shape is not included."""
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def decoded(text: str, size: int, where: str) -> NDArray[np.float64]:
    """Decode the text of an array, flat and read-only.

    Raises:
        StorageError: ``where`` is not a text of ``size`` numbers by `encoded`, or they are larger than `LARGEST` or not
            finite.
    """
    try:
        data = base64.b64decode(text, validate=True)
        # The last character may have bits that belong to no byte; another text of the same bytes is damage, too.
        only_text = base64.b64encode(base64.b64decode(text[-4:])).decode() == text[-4:]
    except (binascii.Error, ValueError) as error:
        raise StorageError(f"{where} is damaged: it is not base64 ({reason(error)})") from error
    if len(data) != 8 * size:
        raise StorageError(f"{where} is damaged: it has {len(data)} bytes where {8 * size} were expected")
    if not only_text:
        raise StorageError(f"{where} is damaged: it is not base64 (its last bits are not zero)")
    values = np.frombuffer(data, "<f8").astype(np.float64, copy=False)
    if not np.abs(values).max(initial=0.0) <= LARGEST:
        raise StorageError(f"{where} is damaged: it has numbers that are not finite or larger than {LARGEST}")
    return values


def upper_triangle(size: int) -> NDArray[np.bool_]:
    """True on and above the diagonal, [size, size]; as a mask it lists a symmetric matrix row by row."""
    return np.triu(np.ones((size, size), dtype=bool))
