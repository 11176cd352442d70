"""The CRC-32C of joined bytes from those of their pieces, which can be computed in any order.

Source: zlib's ``crc32_combine`` (https://github.com/madler/zlib/blob/develop/crc32.c), with the other polynomial.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

_POLYNOMIAL: Final = 0x82F63B78
"""The polynomial of CRC-32C, lowest power in the highest bit."""
_ONE: Final = 1 << 31


def joined(pieces: Iterable[tuple[int, int]]) -> int:
    """The checksum of consecutive pieces together.

    Args:
        pieces: the checksum and the number of bytes of each piece, in order.
    """
    joined_crc = 0
    for checksum, nbytes in pieces:
        joined_crc = _multiplied(_power(nbytes), joined_crc) ^ checksum
    return joined_crc


def _multiplied(left: int, right: int) -> int:
    """The product of two polynomials, modulo the polynomial of the checksum."""
    product, bit = 0, _ONE
    while bit:
        if left & bit:
            product ^= right
        right = (right >> 1) ^ _POLYNOMIAL if right & 1 else right >> 1
        bit >>= 1
    return product


@lru_cache(maxsize=1024)
def _power(nbytes: int) -> int:
    """x to the power of 8 ``nbytes``, the factor by which so many following bytes change a checksum."""
    power, square, left = _ONE, _ONE >> 8, nbytes
    while left:
        if left & 1:
            power = _multiplied(square, power)
        square = _multiplied(square, square)
        left >>= 1
    return power
