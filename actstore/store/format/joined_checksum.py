"""The CRC-32C of bytes from those of their pieces, which may be computed in any order, each where it is read.

Source: zlib's ``crc32_combine`` (https://github.com/madler/zlib/blob/develop/crc32.c), with the other polynomial.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

_POLYNOMIAL: Final = 0x82F63B78
"""Of CRC-32C, lowest power in the highest bit."""
_ONE: Final = 1 << 31


def joined(pieces: Iterable[tuple[int, int]]) -> int:
    """The checksum of bytes that follow each other.

    Args:
        pieces: checksum and number of bytes of each, in order.
    """
    found = 0
    for checksum, nbytes in pieces:
        found = _multiplied(_power(nbytes), found) ^ checksum
    return found


def _multiplied(left: int, right: int) -> int:
    """The product of two polynomials, modulo that of the checksum."""
    product, bit = 0, _ONE
    while bit:
        if left & bit:
            product ^= right
        right = (right >> 1) ^ _POLYNOMIAL if right & 1 else right >> 1
        bit >>= 1
    return product


@lru_cache(maxsize=1024)
def _power(nbytes: int) -> int:
    """x to the power of 8 ``nbytes``: what so many bytes that follow make of a checksum."""
    found, square, left = _ONE, _ONE >> 8, nbytes
    while left:
        if left & 1:
            found = _multiplied(square, found)
        square = _multiplied(square, square)
        left >>= 1
    return found
