"""SAELens' own trainers on a store: the batches they get, and the errors they raise."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer

from actstore.errors import HookError, LoaderError, MissingExtraError
from actstore.facade import Store
from actstore.integrations import saelens
from actstore.integrations.saelens import (
    DataProvider,
    data_provider,
    prepare,
    resume,
    train_sae,
)
from actstore.integrations.saelens.installed import check_installed
from actstore.opening import open_store
from actstore.storage.local import LocalBlobs
from tests.commands import command
from tests.integrations.conftest import LENGTH, N
from tests.integrations.saes import (
    BATCH,
    D_IN,
    HEADS,
    MLP,
    N_STEPS,
    RESID,
    Recorded,
    one,
    sae_of,
    trainer_config,
    values,
)
from tests.store.example import D_MODEL, example_plan, write_store
from tests.store.example import LENGTH as EXAMPLE_LENGTH


def test_public_names() -> None:
    assert saelens.__all__ == sorted(saelens.__all__)
    assert all(getattr(saelens, name) is not None for name in saelens.__all__)


@pytest.mark.parametrize("hook", [RESID, HEADS])
def test_batches_are_flat_and_of_one_size_and_never_end(store: Store, hook: str) -> None:
    with data_provider(store, hook, batch_size=300, seed=1) as provider:
        assert provider.d_in == {hook: D_IN}
        n = provider.loader.n_batches
        first, second = ([one(next(provider)) for _ in range(n)] for _ in range(2))
    for batch in (*first, *second):
        assert batch.shape == (300, D_IN)
        assert batch.dtype == torch.float32
    assert provider.n_taken == 2 * n
    rows = {row.tobytes() for row in values(store, hook).numpy()}
    assert {row.tobytes() for row in torch.cat(first).numpy()} <= rows
    assert not torch.equal(first[0], second[0])


def test_several_hooks_have_rows_of_the_same_tokens(store: Store) -> None:
    with data_provider(store.url, [RESID, HEADS], batch_size=64, dtype="float64") as provider:
        batch = next(provider)
        sequences, positions = provider.loader.rows(0)
    assert isinstance(batch, dict)
    assert set(batch) == {RESID, HEADS}
    for hook, rows in batch.items():
        assert torch.equal(rows.float(), values(store, hook)[sequences * LENGTH + positions])
        assert rows.dtype == torch.float64


def test_two_trainers_together_see_what_one_sees(store: Store) -> None:
    def seen(rank: int, world_size: int) -> list[torch.Tensor]:
        batches: list[torch.Tensor] = []

        class Kept(Recorded):
            def __next__(self) -> torch.Tensor:
                batches.append(one(super().__next__()))
                return batches[-1]

        with data_provider(store, RESID, batch_size=BATCH, rank=rank, world_size=world_size) as provider:
            cfg = trainer_config()
            cfg.train_batch_size_samples = BATCH // world_size
            cfg.total_training_samples = N_STEPS * BATCH // world_size
            trainer = SAETrainer(cfg, sae_of("topk"), Kept(provider))
            prepare(trainer, provider)
            trainer.fit()
        return batches

    alone, first, second = seen(0, 1), seen(0, 2), seen(1, 2)
    assert len(alone) == len(first) == len(second) == N_STEPS
    assert N_STEPS * BATCH > N * LENGTH  # so there are two epochs
    for whole, *parts in zip(alone, first, second, strict=True):
        np.testing.assert_array_equal(_sorted(whole), _sorted(torch.cat(parts)))


def _sorted(rows: torch.Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = rows.numpy()
    return values[np.lexsort(values.T)]


def test_the_scale_is_what_saelens_would_estimate(store: Store) -> None:
    rows = values(store, RESID)
    theirs = ActivationScaler()
    theirs.estimate_scaling_factor(
        D_IN, iter(torch.split(rows, 512)), n_batches_for_norm_estimate=N * LENGTH // 512
    )
    with data_provider(store, RESID, batch_size=BATCH) as provider:
        trainer = SAETrainer(trainer_config(), sae_of("standard"), provider)
        prepare(trainer, provider)
        assert trainer.activation_scaler.scaling_factor == pytest.approx(theirs.scaling_factor, rel=1e-6)
        assert provider.n_taken == 0


def test_the_scale_is_that_of_the_rows_that_are_left(store: Store) -> None:
    is_kept = torch.from_numpy(store.tokens[:] != store.plan.request.model.config["bos_token_id"]).flatten()
    norms = values(store, RESID).norm(dim=1)
    expected = math.sqrt(D_IN) / norms[is_kept].mean().item()
    assert abs(norms.mean() / norms[is_kept].mean() - 1) > 1e-4  # otherwise the test shows nothing
    with data_provider(store, RESID, batch_size=BATCH, drop="bos") as provider:
        trainer = SAETrainer(trainer_config(), sae_of("standard"), provider)
        prepare(trainer, provider)
        assert trainer.activation_scaler.scaling_factor == pytest.approx(expected, rel=1e-6)
        assert provider.n_taken == 0
        assert provider.state_dict()["loader"]["batch"] == 0


@pytest.mark.parametrize("kind", ["positions", "mask"])
def test_the_scale_is_estimated_from_all_over_the_store(drifting: Store, kind: str) -> None:
    """Norms and the share of kept rows grow with the row, so a mean over the first rows would be far off."""
    n_sequences, length = drifting.shape
    share = np.linspace(0.1, 0.9, n_sequences)[:, None]
    keep = np.random.default_rng(0).random((n_sequences, length)) < share
    options: Any = {"seqpos": slice(1, None)} if kind == "positions" else {"mask": keep}
    kept = keep if kind == "mask" else np.arange(length) > np.zeros((n_sequences, 1))
    hook = drifting.hooks[0]
    norms = drifting[hook][:].norm(dim=2)
    mean = norms[torch.from_numpy(kept)].mean().item()
    assert abs(norms[:4096].mean() / mean - 1) > 0.3
    scales = []
    for shuffle, rank in ((None, 0), ("global", 0), ("window", 1)):
        options |= {"batch_size": 2 * BATCH, "shuffle": shuffle, "rank": rank, "world_size": 2}
        with data_provider(drifting, hook, **options) as provider:
            sae = StandardTrainingSAE(
                StandardTrainingSAEConfig(
                    d_in=D_MODEL, d_sae=8, normalize_activations="expected_average_only_in"
                )
            )
            trainer = SAETrainer(trainer_config(), sae, provider)
            prepare(trainer, provider)
            scales.append(trainer.activation_scaler.scaling_factor)
    assert scales[0] == pytest.approx(math.sqrt(D_MODEL) / mean, rel=0.02)
    assert scales[0] == scales[1] == scales[2]


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """131,072 rows, far more than a mean norm samples; norms grow eightfold, and are larger at position 0."""
    n = 16_384
    plan = example_plan(n_sequences=n, n_tokens=n * EXAMPLE_LENGTH, segment_size=4096)
    request = plan.request.model_copy(update={"hooks": plan.request.hooks[:1], "batch_size": 4096})
    plan = plan.model_copy(update={"request": request})
    values = np.random.default_rng(0).normal(size=(n, EXAMPLE_LENGTH, D_MODEL)).astype("<f4")
    values *= np.linspace(1, 8, n, dtype="<f4")[:, None, None]
    values[:, 0] *= 20
    blobs = LocalBlobs(tmp_path_factory.mktemp("drifting"))
    write_store(blobs, plan, {plan.hook_names[0]: values}, range(plan.n_segments))
    return open_store(blobs.url)


def test_whitening_is_what_saelens_would_estimate(store: Store) -> None:
    theirs = ActivationScaler()
    rows = values(store, MLP)
    theirs.estimate_whitening(
        D_IN, iter(torch.split(rows, 512)), n_batches_for_norm_estimate=N * LENGTH // 512
    )
    assert theirs.whitening is not None
    cfg = StandardTrainingSAEConfig(d_in=D_IN, d_sae=64, normalize_activations="covariance_whitening")
    with data_provider(store, MLP, batch_size=BATCH) as provider:
        trainer = SAETrainer(trainer_config(n_steps=2), StandardTrainingSAE(cfg), provider)
        prepare(trainer, provider)
        ours = trainer.activation_scaler.whitening
        assert ours is not None
        torch.testing.assert_close(ours.mean, theirs.whitening.mean, rtol=1e-6, atol=1e-9)
        # The sign of an eigenvector is arbitrary.
        for a, b in ((ours, theirs.whitening), (theirs.whitening, ours)):
            torch.testing.assert_close(a.matrix @ a.matrix.T, b.matrix @ b.matrix.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.matrix @ ours.inverse_matrix, torch.eye(D_IN, dtype=torch.float64))
        trainer.fit()
        assert provider.n_taken == 2


def test_what_does_not_fit_is_refused(store: Store, tmp_path: Path) -> None:
    def provider(hooks: str | list[str] = RESID, batch_size: int = BATCH, **options: Any) -> DataProvider:
        return data_provider(store, hooks, batch_size=batch_size, **options)

    trainer = SAETrainer(trainer_config(), sae_of("topk"), iter(()))
    with pytest.raises(HookError, match="does not hold 'blocks.9"):
        provider("blocks.9.hook_resid_post")
    with pytest.raises(LoaderError, match="batch_size is 257, for 2 ranks together.*ask for a multiple of 2"):
        provider(batch_size=257, world_size=2)
    with pytest.raises(LoaderError, match="train_batch_size_samples is 256, and batches have 128 rows"):
        prepare(trainer, provider(world_size=2))
    with pytest.raises(LoaderError, match="SAETrainer takes batches of one hook"):
        prepare(trainer, provider([RESID, MLP]))
    narrow = SAETrainer(
        trainer_config(), StandardTrainingSAE(StandardTrainingSAEConfig(d_in=7, d_sae=8)), iter(())
    )
    with pytest.raises(LoaderError, match="d_in of the SAE is 7, and rows of .* have 128 elements"):
        prepare(narrow, provider())
    for config in (TopKTrainingSAEConfig, BatchTopKTrainingSAEConfig):
        for k, is_refused in ((17, True), (16, False)):
            trainer = SAETrainer(
                trainer_config(), TrainingSAE.from_dict(config(d_in=128, d_sae=16, k=k).to_dict()), iter(())
            )
            refusal = pytest.raises(LoaderError, match=f"k of the SAE is {k}, and it has only 16 latents")
            with refusal if is_refused else nullcontext():
                prepare(trainer, provider())
    with pytest.raises(LoaderError, match="holds no actstore_position.json"):
        resume(trainer, provider(), tmp_path)
    with pytest.raises(LoaderError, match=f"the state is of {MLP}, and this provider reads {RESID}"):
        provider().load_state_dict(provider(MLP).state_dict())
    with pytest.raises(LoaderError, match="seed 0, and this one has 1"):
        provider(seed=1).load_state_dict(provider().state_dict())
    with pytest.raises(LoaderError, match="is not the state of a data provider"):
        provider().load_state_dict({})
    options: dict[str, Any] = {"epochs": 2, "drop_last": False, "provenance": True}
    for name, value in options.items():
        with pytest.raises(LoaderError, match=f"{name} cannot be set here: .* leave it out"):
            data_provider(store, RESID, batch_size=BATCH, **{name: value})
    with pytest.raises(LoaderError, match="batch_size cannot be set here: it is train_batch_size_samples"):
        train_sae(store, RESID, trainer_config(), sae=sae_of("topk"), batch_size=7)  # type: ignore[call-arg]
    with pytest.raises(LoaderError, match="sae is str; give a TrainingSAE"):
        train_sae(store, RESID, trainer_config(), sae="standard")
    with pytest.raises(MissingExtraError, match=r"pip install 'actstore\[saelens\]'"):
        check_installed("a_package_that_is_not_there")


def test_without_saelens_there_are_batches_and_a_clear_error(store: Store) -> None:
    script = f"""
import sys
sys.modules["sae_lens"] = None  # as if it were not installed
from actstore.integrations.saelens import data_provider, train_sae
with data_provider({store.url!r}, {RESID!r}, batch_size=64) as provider:
    assert next(provider).shape == (64, {D_IN})
train_sae({store.url!r}, {RESID!r}, None, sae=None)
"""
    done = command(code=script)
    assert "MissingExtraError: the package sae_lens is not installed" in done.stderr
    assert "pip install 'actstore[saelens]'" in done.stderr
