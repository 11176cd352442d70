"""What continues prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from actstore.tokens.batch import TokenIds


@dataclass(frozen=True)
class Continuation:
    """The end of a sequence that began with a prompt."""

    ids: TokenIds
    """[n_new_tokens], with the token that ended it, if one did."""
    finish: Literal["stop", "length"]
    """Whether the model ended it, or its length did."""


class Engine(Protocol):
    """Continues prompts."""

    def __call__(self, prompts: Sequence[TokenIds], seeds: Sequence[int]) -> list[Continuation]:
        """Continue each prompt, drawing by its own seed, which is below 2^63."""
