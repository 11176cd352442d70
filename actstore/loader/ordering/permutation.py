"""A permutation of ``0 ... n - 1`` that is computed, not kept: any part of it, in any order, without memory."""

import hashlib
import math
import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_ROUNDS: Final = 6
"""Of which each mixes one half. Four are enough for an adversary not to see a pattern, if each is perfect (Luby and
Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988).
"""
_MAX: Final = 1 << 62
_BLOCK: Final = 1 << 14
"""Numbers that are worked on together, so that all of them stay in the cache."""
_MIX: Final = np.uint32(0x85EBCA6B)
"""An odd number without a pattern; of the finaliser of MurmurHash3."""
_FEW: Final = 32
"""Numbers for which Python takes less time than NumPy takes to begin."""
_MASK: Final = (1 << 32) - 1
_HALF: Final = np.uint32(16)
_WORD: Final = np.uint64(32)


class Permutation:
    """A keyed bijection: a Feistel network over a grid of a x b >= n numbers, as in section 5 of Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains" (2002). Numbers that come out at n or above go in again until they do not;
    since a and b are next to the root of n, that happens to one number in about its root.

    The same everywhere: it uses nothing but arithmetic of 32 and 64 bits without sign, and BLAKE2b for the keys.
    """

    def __init__(self, n: int, *key: int) -> None:
        """
        Args:
            n: how many numbers, up to 2^62.
            key: any integers from 0 to 2^64 - 1; each choice is another permutation.
        """
        if not 1 <= n <= _MAX:
            raise ValueError(f"a permutation is of 1 to 2^62 numbers, not of {n}")
        self.n = n
        n_low = math.isqrt(n - 1) + 1
        self._sizes = (n_low, -(-n // n_low))
        digest = hashlib.blake2b(struct.pack(f"<{len(key)}Q", *key)).digest()
        keys = np.frombuffer(digest, "<u4").astype(np.uint32)[: 2 * _ROUNDS].reshape(_ROUNDS, 2)
        self._keys = keys | np.array([1, 0], np.uint32)  # only odd numbers can be divided by again
        self._key_integers: list[list[int]] = self._keys.tolist()

    def __call__(self, indices: NDArray[Any]) -> NDArray[np.int64]:
        """Where each of the numbers goes.

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
        """The same as `_permute` until it is below n."""
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
        """In place. Numbers come out below a x b."""
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
            # A hash of 32 bits, of which the high ones count: those of a product depend on all bits below them.
            np.multiply(other, factor, out=mixed)
            np.add(mixed, term, out=mixed)
            np.right_shift(mixed, _HALF, out=spare)
            np.bitwise_xor(mixed, spare, out=mixed)
            np.multiply(mixed, _MIX, out=mixed)
            # Scaled to 0 ... size - 1: the high half of a product of 64 bits.
            np.multiply(mixed, np.uint64(size), out=wide)
            np.right_shift(wide, _WORD, out=wide)
            np.copyto(mixed, wide, casting="same_kind")
            # The sum modulo size: what wrapped around below zero is the larger one of the two.
            np.add(half, mixed, out=half)
            np.subtract(half, np.uint32(size), out=spare)
            np.minimum(half, spare, out=half)
        np.multiply(high, n_low, out=numbers)
        np.add(numbers, low, out=numbers)


class _Scratch:
    """Memory for `_permute`: to ask the system for it anew takes longer than to fill it."""

    def __init__(self, n: int) -> None:
        self._words = np.empty((4, n), np.uint32)
        self._wide = np.empty(n, np.uint64)

    def of(self, n: int) -> tuple[NDArray[Any], ...]:
        return (*self._words[:, :n], self._wide[:n])
