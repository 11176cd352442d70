"""SAEs of SAELens for evaluations, and SAELens' own figures of them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens.evals import get_sparsity_and_variance_metrics
from sae_lens.registry import get_sae_class
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor


def sae_of(kind: str, d_in: int, d_sae: int, **settings: Any) -> Any:
    """An SAE of SAELens with random weights; some of its features are dead."""
    own = {"topk": {"k": 4}}.get(kind, {})
    sae_class, config_class = get_sae_class(kind)
    sae = sae_class(config_class(d_in=d_in, d_sae=d_sae, **own, **settings))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            if name != "threshold":
                weight.copy_(torch.randn(weight.shape, generator=random) / 3)
        sae.b_enc[:3] = -1e4
        if kind == "jumprelu":
            sae.threshold.fill_(0.4)
    return sae


def figures_of_sae_lens(
    sae: Any, rows: NDArray[np.float32], scaler: ActivationScaler | None = None
) -> tuple[dict[str, float], list[float]]:
    """SAELens' figures of these rows as one batch, and the density of each feature."""

    class Model:
        """What their evaluation asks of a model and of a store of activations: one row is one token."""

        def get_batch_tokens(self, _n: int) -> Tensor:
            return torch.zeros(1, len(rows), dtype=torch.long)

        def run_with_cache(self, _tokens: Tensor, **_options: Any) -> tuple[None, dict[str, Tensor]]:
            return None, {"blocks.0.hook_resid_post": torch.from_numpy(rows)[None]}

    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    model: Any = Model()
    flags = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    with torch.no_grad():
        figures, by_feature = get_sparsity_and_variance_metrics(
            sae,
            model,
            model,
            scaler or ActivationScaler(),
            n_batches=1,
            eval_batch_size_prompts=1,
            model_kwargs={},
            **{f"compute_{flag}": True for flag in flags},
        )
    return figures, by_feature["feature_density"]
