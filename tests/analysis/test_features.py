"""SAEs of SAELens whose training goes on give the features of what SAELens would save of them."""

import warnings
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig

from actstore.analysis.features import features_of
from actstore.errors import JobError


def training_sae(normalize_activations: str) -> TopKTrainingSAE:
    torch.manual_seed(0)
    config = TopKTrainingSAEConfig(d_in=8, d_sae=24, k=3, normalize_activations=normalize_activations)
    sae = TopKTrainingSAE(config)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 24)[:, None])  # SAELens makes all norms 1 when it saves
    return sae


def test_features_of_a_training(tmp_path: Path) -> None:
    sae = training_sae("none")
    sae.save_inference_model(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = SAE.load_from_disk(str(tmp_path))
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = saved.encode(rows)
    assert (expected != 0).sum() == 150
    torch.testing.assert_close(features_of(sae, (8,))(rows), expected)


def test_rows_that_would_have_to_be_normalised_are_refused() -> None:
    """Their features would be wrong by a factor that nothing tells."""
    with pytest.raises(
        JobError, match=r"takes rows with the normalisation expected_average_only_in, and does not"
    ):
        features_of(training_sae("expected_average_only_in"), (8,))
