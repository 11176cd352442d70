"""The tokens whose logits a feature raises and lowers most, by its direction alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.describing.logit_lens import logit_lens
from actstore.errors import JobError


@dataclass(frozen=True)
class Logits:
    """Effects of features on logits, per unit of activation, without the scale of the final norm."""

    top: NDArray[np.int64]
    """Ids of the tokens whose logits are raised most, first the highest, [n_features, k]."""
    top_values: NDArray[np.float32]
    bottom: NDArray[np.int64]
    """Ids of the tokens whose logits are lowered most, first the lowest, [n_features, k]."""
    bottom_values: NDArray[np.float32]


def logits_of(decoder: NDArray[np.float32], of: Any, k: int) -> Logits:
    """The k tokens at each end, for each feature, as `logit_lens` finds them.

    Args:
        decoder: direction of each feature, [n_features, d_model].
        of: a `HookedModel`, or ``W_U`` [d_model, d_vocab].
        k: number of tokens.

    Raises:
        JobError: the directions are not in the residual stream.
    """
    d_model, d_vocab = (of.W_U if hasattr(of, "W_U") else of).shape
    if decoder.shape[1] != d_model:
        turned = "W_U is [d_model, d_vocab], so give W_U.T" if decoder.shape[1] == d_vocab else ""
        raise JobError(
            f"the directions of the features have {decoder.shape[1]} elements and W_U takes {d_model}; "
            + (turned or "such features do not write to the residual stream; leave model and W_U out")
        )
    lens = logit_lens(decoder, of, min(k, d_vocab))
    return Logits(lens.top_tokens, lens.top_logits, lens.bottom_tokens, lens.bottom_logits)
