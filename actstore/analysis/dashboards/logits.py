"""The tokens whose logits a feature raises and lowers most, by its direction alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError

if TYPE_CHECKING:
    import torch

_FEATURES: Final = 256
"""Features whose logits are computed together."""


@dataclass(frozen=True)
class Logits:
    """Effects of features on logits, per unit of activation, without the scale of the final norm."""

    top: NDArray[np.int64]
    """Ids of the tokens whose logits are raised most, first the highest, [n_features, k]."""
    top_values: NDArray[np.float32]
    bottom: NDArray[np.int64]
    """Ids of the tokens whose logits are lowered most, first the lowest, [n_features, k]."""
    bottom_values: NDArray[np.float32]


def unembedding(model: Any, W_U: "torch.Tensor | None") -> "torch.Tensor | None":  # noqa: N803
    """The matrix from the stream to logits, float32 [d_model, d_vocab]; None if there is neither of both.

    Args:
        model: a `HookedModel`, whose final norm has a gain that counts, too.
        W_U: the matrix itself.
    """
    from actstore.errors import ModelError

    if W_U is not None:
        return W_U.detach().float().cpu()
    if model is None:
        return None
    matrix: torch.Tensor = model.W_U.detach().float().cpu()
    try:
        gain = model.ln_final.w.detach().float().cpu()
    except ModelError:  # a model without a final norm
        return matrix
    scaled: torch.Tensor = gain[:, None] * matrix
    return scaled


def logits_of(decoder: NDArray[np.float32], matrix: "torch.Tensor", k: int) -> Logits:
    """The k tokens at each end, for each feature.

    Args:
        decoder: direction of each feature, [n_features, d_model].
        matrix: float32 [d_model, d_vocab].
        k: number of tokens.

    Raises:
        JobError: the directions are not in the residual stream.
    """
    import torch

    if decoder.shape[1] != matrix.shape[0]:
        raise JobError(
            f"the directions of the features have {decoder.shape[1]} elements and W_U takes {matrix.shape[0]}, so the "
            "features do not write to the residual stream; leave model and W_U out"
        )
    parts: list[list[NDArray[Any]]] = []
    for start in range(0, len(decoder), _FEATURES):
        effects = torch.from_numpy(decoder[start : start + _FEATURES].copy()) @ matrix
        most = min(k, effects.shape[1])
        top, bottom = effects.topk(most), effects.topk(most, largest=False)
        parts.append([top.indices.numpy(), top.values.numpy(), bottom.indices.numpy(), bottom.values.numpy()])
    return Logits(*(np.concatenate(one) for one in zip(*parts, strict=True)))
