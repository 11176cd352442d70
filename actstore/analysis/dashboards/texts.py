"""The tokens around examples, and the text of each token id."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.feature_activations.activation_examples import ActivationExamples

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore


@dataclass(frozen=True)
class Contexts:
    """Token ids around each example."""

    ids: NDArray[np.int32]
    """[n_examples, before + 1 + after]; -1 where the sequence has no such position."""
    documents: NDArray[np.int64]
    """Document of each example's token, -1 for tokens that packing put in, [n_examples]."""

    @classmethod
    def of(cls, store: "CommittedStore", examples: ActivationExamples) -> "Contexts":
        """Read the tokens of the sequences that examples are in."""
        sequences, inverse = np.unique(examples.sequences, return_inverse=True)
        width = examples.windows.shape[1]
        if not len(sequences):
            return cls(np.empty((0, width), np.int32), np.empty(0, np.int64))
        rows = sequences.tolist()
        tokens, lengths = store.tokens[rows], np.asarray(store.lengths[rows])[inverse]
        positions = examples.positions[:, None] + np.arange(width) - examples.before
        is_there = (positions >= 0) & (positions < lengths[:, None])
        ids = tokens[inverse[:, None], np.clip(positions, 0, tokens.shape[1] - 1)]
        documents = store.documents[rows][inverse, examples.positions]
        return cls(np.where(is_there, ids, -1).astype(np.int32), documents)


def texts_of(tokenizer: Any, *ids: NDArray[Any]) -> dict[int, str]:
    """The text of each token id; negative ids have none.

    Args:
        tokenizer: a tokenizer of Hugging Face.
        ids: arrays of ids.
    """
    if not ids:
        return {}
    distinct = np.unique(np.concatenate([np.unique(one) for one in ids]))
    return {token: tokenizer.decode([token]) for token in distinct.tolist() if token >= 0}
