"""Caches for SAELens that are made from a store."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset, load_from_disk
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, StandardTrainingSAEConfig
from sae_lens.config import LoggingConfig
from sae_lens.load_model import load_model

from actstore.cli.main import cli
from actstore.demo import MODEL_PATH
from actstore.errors import HookError, StorageError
from actstore.facade import Store
from actstore.integrations.saelens import cache_export, export_cache
from tests.integrations.conftest import LENGTH, N
from tests.integrations.saes import BATCH, D_IN, HEADS, RESID


@pytest.mark.parametrize("hook", [RESID, HEADS])
def test_the_cache_holds_the_rows_of_the_store(
    store: Store, hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_nbytes = LENGTH * D_IN * 4
    monkeypatch.setattr(cache_export, "_BLOCK_NBYTES", 10 * row_nbytes)
    monkeypatch.setattr(cache_export, "_FILE_NBYTES", 100 * row_nbytes)
    seen: list[int] = []
    assert export_cache(store, hook, tmp_path / "cache", on_bytes=seen.append) == N
    assert len(seen) == 26
    assert 0 <= sum(seen) - N * (row_nbytes + LENGTH * 4) < 0.02 * N * row_nbytes
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.arrow")) == [
        f"data-0000{i}-of-00003.arrow" for i in range(3)
    ]
    cache = load_from_disk(str(tmp_path / "cache"))
    assert cache.features[hook].shape == (LENGTH, D_IN)
    rows = cache.with_format("numpy")[:]
    assert rows[hook].dtype == np.float32
    np.testing.assert_array_equal(rows[hook], store[hook][:].float().flatten(2).numpy())
    np.testing.assert_array_equal(rows["token_ids"], store.tokens[:])


def test_saelens_trains_from_the_cache(store: Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    export_cache(store.url, RESID, cache)
    n_steps = 12
    bos = int(store.tokens[0, 0])
    cfg: LanguageModelSAERunnerConfig[Any] = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=D_IN, d_sae=64, normalize_activations="expected_average_only_in"),
        model_name=str(MODEL_PATH),
        model_class_name="AutoModelForCausalLM",
        hook_name=RESID,
        dataset_path="tokens",
        use_cached_activations=True,
        cached_activations_path=str(cache),
        context_size=LENGTH,
        training_tokens=n_steps * BATCH,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=16,
        n_batches_in_buffer=32,
        n_batches_for_norm_estimate=4,
        exclude_special_tokens=[bos],
        device="cpu",
        act_store_device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(tmp_path / "sae"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model("AutoModelForCausalLM", str(MODEL_PATH), "cpu", hook_names=["transformer.h.2"])
        runner = LanguageModelSAETrainingRunner(
            cfg,
            override_model=model,
            override_dataset=Dataset.from_dict({"input_ids": store.tokens[:].tolist()}),
        )
        rows = {row.tobytes() for row in store[RESID][:].float().flatten(0, 1).numpy()}
        batch = next(runner.activations_store)
        sae = runner.run()
    assert batch.shape == (BATCH, D_IN)
    assert {row.tobytes() for row in batch.numpy()} <= rows
    assert sae.cfg.metadata.hook_name == RESID
    with torch.no_grad():
        assert sae(batch).isfinite().all()


def test_a_folder_with_something_in_it_is_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(StorageError, match="is not empty.*name a new one"):
        export_cache(store, RESID, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(StorageError, match="mine cannot be written: "):
        export_cache(store, RESID, tmp_path / "mine")
    with pytest.raises(HookError, match="does not hold"):
        export_cache(store, "blocks.9.hook_resid_post", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_export_on_the_command_line(store: Store, tmp_path: Path) -> None:
    args = ["export", store.url, "blocks.3.hook_resid_pre", str(tmp_path / "cache"), "--format", "saelens"]
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout == (
        f"256 sequences of {RESID} in {tmp_path / 'cache'}; hook_name={RESID!r}, context_size=32, d_in=128\n"
    )
    assert len(load_from_disk(str(tmp_path / "cache"))) == N
