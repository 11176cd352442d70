"""Tokens whose values have a NaN or an infinity: how many, and where."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FIRST: Final = 8
"""Sequences that are named."""
_INFINITY: Final = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000}
"""Bits of +Inf. Those of NaN are more, without the sign."""


@dataclass(frozen=True)
class NotFinite:
    """Of one hook."""

    n_tokens: int
    """Real tokens with a NaN or an infinity; padding is not counted."""
    first_sequences: tuple[int, ...]
    """The first of the sequences that hold them, as far as they are known."""

    def __add__(self, other: "NotFinite") -> "NotFinite":
        sequences = sorted({*self.first_sequences, *other.first_sequences})
        return NotFinite(self.n_tokens + other.n_tokens, tuple(sequences[:FIRST]))

    def __str__(self) -> str:
        where = ", ".join(map(str, self.first_sequences))
        return f"{self.n_tokens:,} tokens" + (f", first in sequences {where}" if where else "")


def add_up(left: Mapping[str, NotFinite], right: Mapping[str, NotFinite]) -> dict[str, NotFinite]:
    """By hook, of two sets of tokens."""
    none = NotFinite(0, ())
    return {name: left.get(name, none) + right.get(name, none) for name in sorted({*left, *right})}


def is_masked_by_design(hook: str) -> bool:
    """Whether -Inf is what a hook holds where a position does not see another."""
    return hook.endswith("hook_attn_scores")


def not_finite(
    hook: str, rows: NDArray[Any], dtype: str, lengths: NDArray[Any], *, first_sequence: int, batch_size: int
) -> NotFinite:
    """Count them in stored rows.

    Args:
        hook: name; -Inf does not count in attention scores.
        rows: in the storage type, bfloat16 as uint16: [n, L, *shape].
        dtype: the store's name of the type.
        lengths: real tokens of each row, [n].
        first_sequence: number of the first row.
        batch_size: rows that are looked at together.
    """
    n_tokens = 0
    sequences: list[int] = []
    for start, is_wrong in _batches(hook, rows, dtype, lengths, batch_size):
        n_tokens += int(is_wrong.sum())
        if len(sequences) < FIRST:
            sequences += (first_sequence + start + np.flatnonzero(is_wrong.any(axis=1))).tolist()
    return NotFinite(n_tokens, tuple(sequences[:FIRST]))


def _batches(
    hook: str, rows: NDArray[Any], dtype: str, lengths: NDArray[Any], batch_size: int
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """First row of each batch, and [n, L] of it."""
    infinity = _INFINITY[dtype]
    sign = 1 << (8 * rows.itemsize - 1)
    is_real = np.arange(rows.shape[1]) < lengths[:, None]
    for start in range(0, len(rows), batch_size):
        batch = slice(start, start + batch_size)
        bits = rows[batch].view(f"<u{rows.itemsize}")
        is_wrong = (bits & (sign - 1)) >= infinity
        if is_masked_by_design(hook):
            is_wrong &= bits != (infinity | sign)
        yield start, is_wrong.any(axis=tuple(range(2, bits.ndim))) & is_real[batch]
