"""A permutation of ``0 ... n - 1`` that is computed, not kept: any part of it, in any order, without memory."""

import hashlib
import math
import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_ROUNDS: Final = 6
"""Number of rounds; each mixes one half. Four are enough to hide every pattern from an adversary if each round is
perfect (Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988).
"""
_MAX: Final = 1 << 62
_BLOCK: Final = 1 << 14
"""Numbers that are computed together, so that all of them stay in the cache."""
_MIX: Final = np.uint32(0x85EBCA6B)
"""An odd number without a pattern, taken from the finaliser of MurmurHash3."""
_FEW: Final = 32
"""Number of indices up to which plain Python is faster than NumPy."""
_MASK: Final = (1 << 32) - 1
_HALF: Final = np.uint32(16)
_WORD: Final = np.uint64(32)


class Permutation:
    """A keyed bijection: a Feistel network over a grid of a x b >= n numbers, as in section 5 of Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains" (2002). A result of n or above is permuted again until it is below n; since
    a and b are close to the root of n, this concerns about one number in root n.

    It is the same on every machine: it uses only unsigned 32 and 64 bit arithmetic, and BLAKE2b for the keys.
    """

    def __init__(self, n: int, *key: int) -> None:
        """
        Args:
            n: how many numbers, up to 2^62.
            key: any integers from 0 to 2^64 - 1; each choice gives another permutation.
        """
        if not 1 <= n <= _MAX:
            raise ValueError(f"a permutation is of 1 to 2^62 numbers, not of {n}")
        self.n = n
        n_low = math.isqrt(n - 1) + 1
        self._sizes = (n_low, -(-n // n_low))
        digest = hashlib.blake2b(struct.pack(f"<{len(key)}Q", *key)).digest()
        keys = np.frombuffer(digest, "<u4").astype(np.uint32)[: 2 * _ROUNDS].reshape(_ROUNDS, 2)
        self._keys = keys | np.array([1, 0], np.uint32)  # odd numbers only, since they can be inverted
        self._key_integers: list[list[int]] = self._keys.tolist()

    def __call__(self, indices: NDArray[Any]) -> NDArray[np.int64]:
        """The image of each of the numbers.

        Args:
            indices: integers [...] from 0 to n - 1.
        """
        numbers = indices.reshape(-1).astype(np.uint64)
        scratch = _Scratch(min(_BLOCK, len(numbers)))
        for start in range(0, len(numbers), _BLOCK):
            self._permute(numbers[start : start + _BLOCK], scratch)
        while len(outside := np.flatnonzero(numbers >= self.n)):
            if len(outside) <= _FEW:
                numbers[outside] = [self._walked(number) for number in numbers[outside].tolist()]
                break
            again = numbers[outside]
            self._permute(again, _Scratch(len(again)))
            numbers[outside] = again
        return numbers.view(np.int64).reshape(indices.shape)

    def _walked(self, number: int) -> int:
        """Apply `_permute` to one number until it is below n."""
        n_low = self._sizes[0]
        while number >= self.n:
            high, low = divmod(number, n_low)
            for turn, (factor, term) in enumerate(self._key_integers):
                mixed = ((low if turn % 2 else high) * factor + term) & _MASK
                mixed = ((mixed ^ mixed >> 16) * int(_MIX)) & _MASK
                step = mixed * self._sizes[turn % 2] >> 32
                if turn % 2:
                    high = (high + step) % self._sizes[1]
                else:
                    low = (low + step) % n_low
            number = high * n_low + low
        return number

    def _permute(self, numbers: NDArray[np.uint64], scratch: "_Scratch") -> None:
        """Permute numbers below a x b in place."""
        low, high, mixed, spare, wide = scratch.of(len(numbers))
        n_low = np.uint64(self._sizes[0])
        np.floor_divide(numbers, n_low, out=wide)
        np.copyto(high, wide, casting="same_kind")
        np.multiply(wide, n_low, out=wide)
        np.subtract(numbers, wide, out=wide)
        np.copyto(low, wide, casting="same_kind")
        halves = (low, high)
        for turn, (factor, term) in enumerate(self._keys):
            half, other = halves[turn % 2], halves[1 - turn % 2]
            size = self._sizes[turn % 2]
            # A 32 bit hash. Its high bits are used: in a product those depend on all bits below them.
            np.multiply(other, factor, out=mixed)
            np.add(mixed, term, out=mixed)
            np.right_shift(mixed, _HALF, out=spare)
            np.bitwise_xor(mixed, spare, out=mixed)
            np.multiply(mixed, _MIX, out=mixed)
            # Scaled to 0 ... size - 1: the high half of a 64 bit product.
            np.multiply(mixed, np.uint64(size), out=wide)
            np.right_shift(wide, _WORD, out=wide)
            np.copyto(mixed, wide, casting="same_kind")
            # The sum modulo size: of the two, the one that wrapped around below zero is the larger.
            np.add(half, mixed, out=half)
            np.subtract(half, np.uint32(size), out=spare)
            np.minimum(half, spare, out=half)
        np.multiply(high, n_low, out=numbers)
        np.add(numbers, low, out=numbers)


class _Scratch:
    """Scratch memory for `_permute`: allocating it anew takes longer than filling it."""

    def __init__(self, n: int) -> None:
        self._words = np.empty((4, n), np.uint32)
        self._wide = np.empty(n, np.uint64)

    def of(self, n: int) -> tuple[NDArray[Any], ...]:
        return (*self._words[:, :n], self._wide[:n])
