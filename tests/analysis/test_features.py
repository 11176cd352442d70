"""Features of SAEs: those that SAELens gives, in threads and processes, and what tells one SAE from another."""

import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

from actstore import analysis
from actstore.analysis.features import Encoded, features_of
from actstore.analysis.sae_evaluation.autoencoder import EvaluatedSae
from actstore.analysis.scanning.scan import Progress
from actstore.errors import HookError, JobError
from tests.analysis.stores import HOOK, D, store_of


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


def test_threads_that_encode_with_one_sae_keep_their_own_norms() -> None:
    """SAELens leaves the norms of rows in the object, where another thread could put its own in between."""
    torch.manual_seed(0)
    config = StandardSAEConfig(d_in=64, d_sae=64, normalize_activations="constant_norm_rescale")
    features = features_of(StandardSAE(config), (64,))
    rows = [torch.randn(50, 64) * (1 + i % 8) ** 2 for i in range(4000)]
    expected = [features(some) for some in rows]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(features, rows))
    finally:
        sys.setswitchinterval(interval)
    n_wrong = sum(not torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))
    assert n_wrong == 0


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_saes_of_saelens_are_pickled(normalisation: str) -> None:
    """They hold local functions, which have no pickle."""
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=D, d_sae=24, normalize_activations=normalisation))
    rows = torch.randn(30, D)
    features, evaluated = Encoded(sae, latents=(3, 1)), EvaluatedSae.of("sae", sae, (D,))
    first, second, third = pickle.loads(pickle.dumps((features, features, evaluated)))
    assert first is second  # so that features are computed once for several reductions
    assert torch.equal(first(rows), features(rows))
    assert first.identity() == features.identity()
    assert all(map(torch.equal, third(rows), evaluated(rows)))


def test_processes_take_saes_and_refuse_what_they_cannot_be_given(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((12, 8, D)).astype(np.float32)
    store = store_of(tmp_path / "store", values, dtype="float32")
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=D, d_sae=24))
    here = analysis.top_activations(store, HOOK, sae, 3)
    there = analysis.top_activations(store, HOOK, sae, 3, executor="process", num_workers=1)
    np.testing.assert_array_equal(here.values, there.values)
    np.testing.assert_array_equal(here.sequences, there.sequences)
    with pytest.raises(JobError, match="a unit cannot be given to other processes: .*lambda.*; define"):
        analysis.top_activations(store, HOOK, lambda rows: rows, 3, executor="process", num_workers=1)


def test_features_that_are_none_are_refused(tmp_path: Path) -> None:
    """In one sentence, not by whatever fails on them later."""
    values = np.random.default_rng(0).standard_normal((12, 8, D)).astype(np.float32)
    store = store_of(tmp_path / "store", values, dtype="float32")
    with pytest.raises(JobError, match="^directions hold NaN or infinity"):
        analysis.top_activations(store, HOOK, np.full((1, D), np.nan))
    with pytest.raises(JobError, match=r"the function gave int \[\] for \d+ rows; it must give a tensor"):
        analysis.top_activations(store, HOOK, lambda _rows: 3)
    with pytest.raises(HookError, match="can mean several hooks, and one is needed here"):
        analysis.top_activations(store, "blocks.*.hook_resid_post", [0])
    with pytest.raises(JobError, match=r"^k is 2\.5; it must be a whole number, 1 or more"):
        analysis.top_activations(store, HOOK, [0], k=2.5)  # type: ignore[arg-type]


class OwnSae(torch.nn.Module):
    """An SAE without a configuration, as people write them."""

    def __init__(self, k: int, activation: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(D, 24, bias=False)
        self.activation = activation
        self.k = k

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.activation(self.encoder(rows))
        best = values.topk(self.k, dim=-1)
        return torch.zeros_like(values).scatter(-1, best.indices, best.values)


def test_kept_states_of_saes_that_differ_in_no_weight_are_told_apart(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((12, 8, D)).astype(np.float32)
    store = store_of(tmp_path / "store", values, dtype="float32")
    one = OwnSae(2, torch.nn.ReLU())
    others = [OwnSae(3, torch.nn.ReLU()), OwnSae(2, torch.nn.Sigmoid()), OwnSae(2, torch.nn.LeakyReLU(0.5))]
    kept = str(tmp_path / "kept")
    for sae in (one, *others):
        sae.load_state_dict(one.state_dict())
        resumed = analysis.top_activations(store, HOOK, sae, 3, resume=kept)
        fresh = analysis.top_activations(store, HOOK, sae, 3)
        np.testing.assert_array_equal(resumed.values, fresh.values)
    told: list[Progress] = []
    analysis.top_activations(store, HOOK, one, 3, resume=kept, on_progress=told.append)
    assert not told  # nothing is left to do


@pytest.mark.parametrize(
    ("of", "options", "says"),
    [
        (lambda rows: 5, {}, r"gave int \[\] for"),
        (lambda rows: rows[:, :0], {}, r"gave Tensor \[96, 0\] for 96 rows"),
        ([[1.0, 2.0], [1.0]], {}, "features are no array"),
        (
            StandardSAE(StandardSAEConfig(d_in=D + 1, d_sae=4)),
            {},
            r"the SAE does not take rows of shape \[16\]",
        ),
        ([1], {"num_workers": -1}, "num_workers is -1; it must be 1 or more"),
        ([1], {"num_workers": 0}, "num_workers is 0; it must be 1 or more"),
    ],
    ids=["number", "none", "ragged", "sae", "negative", "no-worker"],
)
def test_what_is_no_feature_is_told_in_our_words(
    tmp_path: Path, of: Any, options: dict[str, Any], says: str
) -> None:
    values = np.random.default_rng(0).standard_normal((12, 8, D)).astype(np.float32)
    store = store_of(tmp_path / "store", values, dtype="float32")
    with pytest.raises(JobError, match=says):
        analysis.feature_statistics(store, HOOK, of, **options)
