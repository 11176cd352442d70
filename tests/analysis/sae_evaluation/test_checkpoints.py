"""SAEs in folders: those of trainings, in which rows are normalised, are what SAELens makes of them at the end."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sae_lens import SAE, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler

from actstore import analysis
from actstore.analysis.sae_evaluation.figures import SaeFigures
from actstore.errors import JobError
from actstore.facade import Store
from actstore.integrations.saelens import train_sae
from tests.analysis.sae_evaluation.saes import figures_of_sae_lens
from tests.analysis.stores import HOOK, D, store_of

LOADED_HERE = pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty model_from_pretrained_kwargs")
"""SAELens warns of how models are loaded, where the tests themselves load an SAE."""
KINDS = {
    "topk": ("topk", "expected_average_only_in"),
    "standard": ("standard", "expected_average_only_in"),
    "batchtopk": ("batchtopk", "expected_average_only_in"),
    "whitened": ("standard", "covariance_whitening"),
    "as stored": ("jumprelu", "none"),
}
FIGURES = {"explained_variance": "explained_variance", "mse": "mse", "l0": "l0", "l1": "l1"}


@pytest.fixture(scope="module")
def values() -> NDArray[np.float32]:
    random = np.random.default_rng(2)
    mixed = random.standard_normal((120, 8, 6)) @ random.standard_normal((6, D))
    return np.asarray(3 * mixed + random.standard_normal((120, 8, D)) / 3 + 5, np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, values: NDArray[np.float32]) -> Store:
    return store_of(tmp_path_factory.mktemp("store"), values)


def train(store: Store, kind: str, folder: Path) -> Any:
    """Train an SAE a little, with two checkpoints, and save it."""
    architecture, normalisation = KINDS[kind]
    own = {"k": 3} if "topk" in architecture else {}
    config = get_sae_training_class(architecture)[1](
        d_in=D, d_sae=32, normalize_activations=normalisation, **own
    )
    cfg = SAETrainerConfig(
        total_training_samples=32 * 60,
        train_batch_size_samples=32,
        lr=3e-3,
        n_checkpoints=2,
        checkpoint_path=str(folder / "checkpoints"),
        n_batches_for_norm_estimate=5,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from SAELens itself
        return train_sae(store, HOOK, cfg, sae=config, output=folder / "trained")


def saved_at_the_end(sae: Any, scaler: ActivationScaler, folder: Path) -> Any:
    """What SAELens would save if the training ended here."""
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        sae.fold_activation_whitening(
            scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix
        )
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


def assert_same(figures: SaeFigures, theirs: dict[str, float]) -> None:
    for ours, their_name in FIGURES.items():
        assert getattr(figures, ours) == pytest.approx(theirs[their_name], rel=1e-3), ours


@LOADED_HERE
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_what_becomes_of_them(
    kind: str, store: Store, values: NDArray[np.float32], tmp_path: Path
) -> None:
    trained = train(store, kind, tmp_path)
    for pickled in tmp_path.rglob("*.pt"):
        pickled.write_bytes(b"not even a pickle")
    rows = values.reshape(-1, D)
    evaluation = analysis.evaluate_sae(
        store, HOOK, [tmp_path / "checkpoints", str(tmp_path / "trained"), trained]
    )
    assert [one.name for one in evaluation] == ["672", "1312", "trained", "sae 2"]
    assert [one.n_samples for one in evaluation] == [672, 1312, None, None]
    for name in ("672", "1312"):
        folder = tmp_path / "checkpoints" / name
        scaler = ActivationScaler()
        scaler.load(folder / "activation_scaler.json")
        assert (scaler.scaling_factor is None) == ("expected" not in KINDS[kind][1])
        assert (scaler.whitening is None) == (kind != "whitened")
        in_training = TrainingSAE.load_from_disk(folder)
        if "topk" not in kind:
            # SAELens measures batchtopk batch by batch in training, and topk with features in other units.
            assert_same(evaluation[name], figures_of_sae_lens(in_training, rows, scaler)[0])
        as_saved = saved_at_the_end(in_training, scaler, tmp_path / f"saved-{name}")
        assert_same(evaluation[name], figures_of_sae_lens(as_saved, rows)[0])
    theirs, density = figures_of_sae_lens(SAE.load_from_disk(tmp_path / "trained"), rows)
    for name in ("trained", "sae 2"):
        assert_same(evaluation[name], theirs)
        np.testing.assert_allclose(evaluation[name].density, density, atol=1e-6)


def test_order_of_a_folder_is_that_of_its_numbers(store: Store, tmp_path: Path) -> None:
    train(store, "as stored", tmp_path)
    for name in ("900", "10000", "final_20000", "notes"):
        shutil.copytree(tmp_path / "checkpoints" / "672", tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "notes" / "cfg.json").unlink()
    evaluation = analysis.evaluate_sae(store, HOOK, {"run": tmp_path / "checkpoints"})
    names = ["672", "900", "1312", "10000", "final_20000"]
    assert [one.name for one in evaluation] == [f"run/{name}" for name in names]
    assert [one.n_samples for one in evaluation] == [672, 900, 1312, 10000, 20000]
    whole = analysis.evaluate_sae(store, HOOK, tmp_path)
    assert [one.name for one in whole] == [*(f"checkpoints/{name}" for name in names), "trained"]
    with pytest.raises(JobError, match="two SAEs have the name 672"):
        analysis.evaluate_sae(store, HOOK, [tmp_path / "checkpoints", tmp_path / "checkpoints" / "672"])


def test_folders_that_hold_no_sae(store: Store, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no SAE"):
        analysis.evaluate_sae(store, HOOK, tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(JobError, match="cannot be loaded as an SAE"):
        analysis.evaluate_sae(store, HOOK, tmp_path)


def test_scale_that_is_missing_is_named(store: Store, tmp_path: Path) -> None:
    train(store, "topk", tmp_path)
    scaler = tmp_path / "checkpoints" / "672" / "activation_scaler.json"
    assert json.loads(scaler.read_text())["scaling_factor"] > 0
    scaler.unlink()
    with pytest.raises(
        JobError, match="normalisation expected_average_only_in, and does not have its numbers"
    ):
        analysis.evaluate_sae(store, HOOK, tmp_path / "checkpoints" / "672")
