"""Counting and locating tokens whose values have NaN or infinity."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FIRST: Final = 8
"""The most sequences that are named."""
_INFINITY: Final = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000}
"""The bits of +Inf, by type. Without the sign, those of NaN are larger."""


@dataclass(frozen=True)
class NotFinite:
    """The tokens of one hook that are not finite."""

    n_tokens: int
    """Number of real tokens with NaN or infinity; padding is not counted."""
    first_sequences: tuple[int, ...]
    """The first sequences that hold such tokens, as far as they are known."""

    def __add__(self, other: "NotFinite") -> "NotFinite":
        sequences = sorted({*self.first_sequences, *other.first_sequences})
        return NotFinite(self.n_tokens + other.n_tokens, tuple(sequences[:FIRST]))

    def __str__(self) -> str:
        where = ", ".join(map(str, self.first_sequences))
        return f"{self.n_tokens:,} tokens" + (f", first in sequences {where}" if where else "")


def add_up(left: Mapping[str, NotFinite], right: Mapping[str, NotFinite]) -> dict[str, NotFinite]:
    """The sums of the counts of two sets of tokens, by hook."""
    none = NotFinite(0, ())
    return {name: left.get(name, none) + right.get(name, none) for name in sorted({*left, *right})}


def is_masked_by_design(hook: str) -> bool:
    """Whether -Inf in this hook means that a position does not attend to another one."""
    return hook.endswith("hook_attn_scores")


def not_finite(
    hook: str, rows: NDArray[Any], dtype: str, counts: NDArray[Any], *, first_sequence: int, batch_size: int
) -> NotFinite:
    """Count the tokens with NaN or infinity in stored rows.

    Args:
        hook: the name of the hook; -Inf does not count in attention scores.
        rows: the values in the storage type (bfloat16 as uint16), [n, entries, *shape].
        dtype: the name of the type in the store.
        counts: the entries in use of each row, [n].
        first_sequence: the number of the first row.
        batch_size: the number of rows that are looked at together.
    """
    n_tokens = 0
    sequences: list[int] = []
    for start, is_wrong in _batches(hook, rows, dtype, counts, batch_size):
        n_tokens += int(is_wrong.sum())
        if len(sequences) < FIRST:
            sequences += (first_sequence + start + np.flatnonzero(is_wrong.any(axis=1))).tolist()
    return NotFinite(n_tokens, tuple(sequences[:FIRST]))


def _batches(
    hook: str, rows: NDArray[Any], dtype: str, counts: NDArray[Any], batch_size: int
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield the first row of each batch, and whether each of its tokens is not finite, [n, entries]."""
    infinity = _INFINITY[dtype]
    sign = 1 << (8 * rows.itemsize - 1)
    is_real = np.arange(rows.shape[1]) < counts[:, None]
    for start in range(0, len(rows), batch_size):
        batch = slice(start, start + batch_size)
        bits = rows[batch].view(f"<u{rows.itemsize}")
        is_wrong = (bits & (sign - 1)) >= infinity
        if is_masked_by_design(hook):
            is_wrong &= bits != (infinity | sign)
        yield start, is_wrong.any(axis=tuple(range(2, bits.ndim))) & is_real[batch]
