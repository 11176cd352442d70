"""What others learn of prompts that a store has, and what they may ask for."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.errors import TokensError


@dataclass(frozen=True)
class Limits:
    """What one call may cost."""

    n_tokens: int
    """Tokens of all prompts together."""
    nbytes: int
    """Bytes that the store may have in the end."""

    def check_tokens(self, n_tokens: int) -> None:
        """
        Raises:
            TokensError: there are more tokens than are allowed.
        """
        if n_tokens > self.n_tokens:
            raise TokensError(
                f"the prompts have {n_tokens:,} tokens, and {self.n_tokens:,} are the most at once; ask for fewer at a "
                "time"
            )

    def check_nbytes(self, nbytes: int, more: int) -> None:
        """
        Raises:
            TokensError: the store would become too large.
        """
        if nbytes + more > self.nbytes:
            raise TokensError(
                f"the store has {nbytes / 1e9:,.3g} GB, these prompts need {more / 1e9:,.3g} GB more, and "
                f"{self.nbytes / 1e9:,.3g} GB are the most; ask for fewer prompts or hooks"
            )


@dataclass(frozen=True)
class StoredPrompts:
    """Where a store has the activations of prompts."""

    sequences: dict[str, NDArray[np.int64]]
    """The sequence of each prompt, [n_prompts], by hook."""
    lengths: NDArray[np.int64]
    """Number of tokens of each prompt, [n_prompts]."""
