"""The figures of one SAE."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.sae_evaluation.sums import (
    BIAS_ABOVE,
    BIAS_BELOW,
    COSINE,
    ERROR,
    L1,
    RATIO,
    SHARE,
    EvaluationState,
)

if TYPE_CHECKING:
    from actstore.analysis.sae_evaluation.autoencoder import EvaluatedSae
    from actstore.patching.loss_recovered import LossRecovered

SCALARS: Final = (
    "name",
    "n_samples",
    "d_sae",
    "explained_variance",
    "explained_variance_legacy",
    "mse",
    "relative_reconstruction_bias",
    "cosine_similarity",
    "norm_ratio",
    "l0",
    "l1",
    "n_rows",
)
LOSSES: Final = (
    "recovered",
    "loss",
    "loss_with_sae",
    "loss_zero",
    "loss_mean",
    "kl_with_sae",
    "kl_zero",
    "n_tokens",
)


@dataclass(frozen=True, eq=False)
class SaeFigures:
    """How good an SAE is. Rows are x, what the SAE makes of them y; means are over rows."""

    name: str
    n_samples: int | None
    """Rows that it was trained on, where the name of its checkpoint says so."""
    d_sae: int
    explained_variance: float
    """``1 - mean |x - y|^2 / mean |x - mean x|^2``: SAELens' ``explained_variance``. NaN if all rows are equal."""
    explained_variance_legacy: float
    """``mean (1 - |x - y|^2 / |x - m|^2)``: SAELens' ``explained_variance_legacy``, with the mean m of the rows of a
    block of up to 8,192 stored rows, as SAELens takes that of a batch. Rows that are m do not count.
    """
    mse: float
    """``mean |x - y|^2``, summed over elements, as in SAELens."""
    relative_reconstruction_bias: float
    """``mean |y|^2 / mean x y``: below 1 if the SAE makes values too small (equation 10 of arXiv:2404.16014)."""
    cosine_similarity: float
    norm_ratio: float
    """``mean |y| / |x|``: SAELens' ``l2_ratio``."""
    l0: float
    """Mean number of features of a row that are not 0."""
    l1: float
    """Mean sum of the absolute features of a row."""
    n_rows: int
    n_active: NDArray[np.int64] = field(repr=False)
    """In how many rows each feature is not 0, [d_sae]."""
    dense_above: float = 0.1
    """Density above which a feature is called dense."""
    losses: "LossRecovered | None" = None
    """What the model loses with the SAE in place of the value, if a model was given."""

    @property
    def density(self) -> NDArray[np.float64]:
        """In which fraction of the rows each feature is not 0, [d_sae]."""
        return self.n_active / self.n_rows

    @property
    def dead_features(self) -> NDArray[np.int64]:
        """Numbers of the features that are 0 in all rows."""
        return np.flatnonzero(self.n_active == 0)

    @property
    def dense_features(self) -> NDArray[np.int64]:
        """Numbers of the features whose density is above `dense_above`."""
        return np.flatnonzero(self.density > self.dense_above)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain numbers by name, with counts of dead and dense features; losses are None without a
        model.
        """
        own = {name: getattr(self, name) for name in SCALARS}
        counts = {"n_dead": len(self.dead_features), "n_dense": len(self.dense_features)}
        losses = {name: None if self.losses is None else getattr(self.losses, name) for name in LOSSES}
        return own | counts | losses

    def density_histogram(self, n_bins: int = 28) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """How many features have which density, in equal steps of its logarithm from half a row of all to 1.

        Returns:
            Counts [n_bins], without dead features, and edges of densities [n_bins + 1].
        """
        edges = np.geomspace(0.5 / self.n_rows, 1.0, n_bins + 1)
        counts, _ = np.histogram(self.density[self.n_active > 0], edges)
        return counts.astype(np.int64), edges


def figures_of(
    state: EvaluationState,
    number: int,
    sae: "EvaluatedSae",
    dense_above: float,
    losses: "LossRecovered | None",
) -> SaeFigures:
    """The figures of one of the SAEs whose sums are in a state."""
    n_rows, n_apart = state.counts.tolist()
    sums, active = state.sums[number], state.active[number]
    mean_square = float(state.squares[0] / n_rows)
    variance = mean_square - float(np.square(state.sum / n_rows).sum())
    mse = float(sums[ERROR] / n_rows)
    return SaeFigures(
        name=sae.name,
        n_samples=sae.n_samples,
        d_sae=sae.d_sae,
        # What is left of equal rows by rounding is no variance.
        explained_variance=1 - mse / variance if variance > 1e-12 * mean_square else float("nan"),
        explained_variance_legacy=1 - float(sums[SHARE]) / n_apart if n_apart else float("nan"),
        mse=mse,
        relative_reconstruction_bias=_ratio(sums[BIAS_ABOVE], sums[BIAS_BELOW]),
        cosine_similarity=float(sums[COSINE] / n_rows),
        norm_ratio=float(sums[RATIO] / n_rows),
        l0=float(active.sum() / n_rows),
        l1=float(sums[L1] / n_rows),
        n_rows=n_rows,
        n_active=active,
        dense_above=dense_above,
        losses=losses,
    )


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else float("nan")
