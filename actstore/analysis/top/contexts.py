"""The text around rows of a store."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.text import tokenizer_of
from actstore.errors import JobError

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

_BLOCK: Final = 1 << 20
"""Token ids that are read together."""


@dataclass(frozen=True)
class Context:
    """A row of a feature with the tokens around it. Its text shows the row's token in double brackets."""

    tokens: tuple[str, ...]
    at: int
    """Place of the row's token in `tokens`."""
    value: float
    sequence: int
    position: int

    def __str__(self) -> str:
        before, after = "".join(self.tokens[: self.at]), "".join(self.tokens[self.at + 1 :])
        return f"{before}[[{self.tokens[self.at]}]]{after}"


def check_window(before: int, after: int) -> None:
    """
    Raises:
        JobError: the numbers of tokens around a row are below 0.
    """
    if before < 0 or after < 0:
        raise JobError(f"before is {before} and after is {after}; both are numbers of tokens, 0 or more")


def windows(
    store: "CommittedStore",
    sequences: NDArray[np.int64],
    positions: NDArray[np.int64],
    before: int,
    after: int,
) -> Iterator[tuple[int, list[int], int]]:
    """The token ids around rows: number of the row in the arguments, ids, and the place of the row's token in them.

    Sequences are read once, in the order of the store, which is also the order of what is given.
    """
    unique, inverse = np.unique(sequences, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    step = max(1, _BLOCK // store.plan.context_length)
    edges = np.searchsorted(inverse[order], np.arange(0, len(unique) + step, step))
    for i, start in enumerate(range(0, len(unique), step)):
        some = unique[start : start + step]
        tokens, lengths = store.tokens[some], store.lengths[some]
        for row in order[edges[i] : edges[i + 1]].tolist():
            place, position = int(inverse[row]) - start, int(positions[row])
            first = max(0, position - before)
            stop = min(position + after + 1, int(lengths[place]))
            yield row, tokens[place, first:stop].tolist(), position - first


class TokenTexts:
    """The text of each token id, decoded once."""

    def __init__(self, store: "CommittedStore") -> None:
        """
        Raises:
            TokensError: the tokenizer is unknown or missing, or is not the same any more.
        """
        self._tokenizer = tokenizer_of(store)
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        text = self._known.get(token)
        if text is None:
            text = self._known[token] = str(self._tokenizer.decode([token]))
        return text
