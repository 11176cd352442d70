"""Stores of chosen positions beside those of all positions of the same prompts, by one model."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from sae_lens import StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

import actstore
from actstore import patching
from actstore.demo import MODEL_PATH
from actstore.errors import JobError, PatchError
from actstore.facade import Store
from actstore.integrations.saelens import export_cache, train_sae

RESID = "blocks.2.hook_resid_post"
HOOKS = [RESID, "blocks.3.hook_resid_post", "blocks.2.attn.hook_pattern"]
LENGTH, N = 24, 90


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """Stores of the same prompts of 1 to 24 tokens, by their positions."""
    folder = tmp_path_factory.mktemp("slots")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 1000, size=1 + int(rng.integers(LENGTH))).tolist() for _ in range(N)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in prompts))
    made = {}
    for positions in ("all", "every:5", "last"):
        plan = actstore.plan(
            model=str(MODEL_PATH),
            tokens=str(folder / "prompts.jsonl"),
            hooks=HOOKS,
            context_length=LENGTH,
            packing="document",
            batch_size=8,
            segment_size=32,
            positions=positions,
            out=str(folder / positions.replace(":", "")),
        )
        actstore.extract(plan)
        made[positions] = actstore.open(plan.blobs.url)
    return made


def places(store: Store) -> tuple[Any, Any]:
    """Sequences and positions of all stored rows."""
    assert store.positions is not None
    positions = store.positions[:]
    sequences, _ = np.nonzero(positions >= 0)
    return sequences, positions[positions >= 0]


@pytest.mark.parametrize("positions", ["every:5", "last"])
@pytest.mark.parametrize("hook", HOOKS)
def test_the_same_values_at_the_same_positions(stores: dict[str, Store], positions: str, hook: str) -> None:
    whole, some = stores["all"], stores[positions]
    assert torch.equal(some[hook].at(*places(some)), whole[hook].at(*places(some)))
    if positions == "last":
        assert torch.equal(some[hook].last(), whole[hook].last())
        assert torch.equal(some[hook].at(range(N), -1), whole[hook].last())


@pytest.mark.parametrize("positions", ["every:5", "last"])
def test_a_cache_has_slots_in_the_place_of_positions(stores: dict[str, Store], positions: str) -> None:
    whole, some = stores["all"], stores[positions]
    model = actstore.HookedModel.from_pretrained(MODEL_PATH, device="cpu")
    rows = [7, 3, 50]
    theirs, ours = whole.cache(rows, model=model), some.cache(rows, model=model)
    assert theirs.positions is None
    assert ours.positions is not None
    assert ours.positions.tolist() == some.positions[rows].tolist()  # type: ignore[index]
    used = ours.positions >= 0
    batch, slots = used.nonzero(as_tuple=True)
    at = ours.positions[batch, slots]
    assert torch.equal(ours["resid_post", 2][batch, slots], theirs["resid_post", 2][batch, at])
    pattern = ours["pattern", 2].movedim(2, 1)
    assert torch.equal(pattern[batch, slots], theirs["pattern", 2].movedim(2, 1)[batch, at])
    # What methods compute is of the slots, too, and needs nothing of other positions.
    assert torch.equal(ours["scale", 3, "ln1"][batch, slots], theirs["scale", 3, "ln1"][batch, at])
    lens = [
        cache.logit_attrs(cache["resid_post", 2][None], tokens=5, pos_slice=None, has_batch_dim=True)
        for cache in (ours, theirs)
    ]
    torch.testing.assert_close(lens[0][:, batch, slots], lens[1][:, batch, at])
    one = ours.apply_slice_to_batch_dim([1])
    assert one.positions is not None
    assert one.positions.tolist() == ours.positions[[1]].tolist()
    assert one.remove_batch_dim().positions.tolist() == ours.positions[1].tolist()  # type: ignore[union-attr]


def test_patching_needs_all_positions(stores: dict[str, Store]) -> None:
    model = actstore.HookedModel.from_pretrained(MODEL_PATH, device="cpu")
    some = stores["every:5"].cache([0, 1])
    prompts = torch.randint(
        2, 1000, (2, stores["every:5"].shape[1]), generator=torch.Generator().manual_seed(0)
    )

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 5]

    with pytest.raises(PatchError, match="patching needs all positions of a prompt; extract them without"):
        patching.grid(model, prompts, some, metric, "resid_post", ("layer", "pos"))
    for value in ("mean", "resample"):
        with pytest.raises(PatchError, match="patching needs all positions of a prompt"):
            patching.ablate(model, prompts, metric, "resid_post", ("layer",), value=value, source=some)


def test_a_cache_for_saelens_has_as_many_rows_of_each_sequence(
    stores: dict[str, Store], tmp_path: Path
) -> None:
    last = stores["last"]
    assert export_cache(last, RESID, tmp_path / "last") == N
    rows = load_from_disk(str(tmp_path / "last")).with_format("numpy")[:]
    np.testing.assert_array_equal(rows[RESID][:, 0], last[RESID].last().float().numpy())
    tokens = last.tokens[:][np.arange(N), last.lengths[:] - 1]
    np.testing.assert_array_equal(rows["token_ids"][:, 0], tokens)
    with pytest.raises(
        JobError, match="have different numbers of chosen positions, and those of a cache of SAELens"
    ):
        export_cache(stores["every:5"], RESID, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_an_sae_is_trained_on_the_rows_that_are_there(stores: dict[str, Store]) -> None:
    some = stores["every:5"]
    d_in = some[RESID].shape[-1]
    cfg = SAETrainerConfig(
        total_training_samples=6 * 32,
        train_batch_size_samples=32,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=100,
        feature_sampling_window=200,
        n_checkpoints=0,
        checkpoint_path=None,
    )
    config = StandardTrainingSAEConfig(d_in=d_in, d_sae=64, normalize_activations="expected_average_only_in")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from SAELens itself
        sae = train_sae(some, RESID, cfg, sae=config)
    assert sae.cfg.metadata.actstore_rows["stored_positions"] == "every:5"
    assert sae.cfg.metadata.actstore_rows["n_rows"] == some.plan.n_rows
    norms = some[RESID].at(*places(some)).double().norm(dim=-1)
    assert some.stats(RESID).mean_norm == pytest.approx(float(norms.mean()), rel=1e-5)
