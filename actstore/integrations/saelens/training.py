"""Training an SAE on a store in one call."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from actstore.errors import LoaderError
from actstore.facade import Store
from actstore.hooks.naming.names import HookName
from actstore.integrations.saelens.checkpoint import resume, save_checkpoint_fn
from actstore.integrations.saelens.installed import check_installed
from actstore.integrations.saelens.preset import prepare
from actstore.integrations.saelens.provider import data_provider
from actstore.loader.arguments import ReadArguments
from actstore.storage.urls import local_path

if TYPE_CHECKING:
    from sae_lens import TrainingSAE, TrainingSAEConfig
    from sae_lens.config import SAETrainerConfig


def train_sae(
    store: Store | str | Path,
    hook: HookName,
    cfg: "SAETrainerConfig",
    *,
    sae: "TrainingSAE[Any] | TrainingSAEConfig",
    resume_from: Path | str | None = None,
    output: Path | str | None = None,
    **options: Unpack[ReadArguments],
) -> "TrainingSAE[Any]":
    """Train an SAE with SAELens on the rows of one hook. SAELens shows its progress.

    Args:
        store: an open store, or its path or URL.
        hook: the name of the hook.
        cfg: SAELens' configuration of the trainer; ``lr_end`` is a tenth of ``lr`` where it is None. With
            ``log_to_wandb``, call ``wandb.init`` before.
        sae: the SAE, or its configuration; then its first weights depend on ``seed`` alone.
        resume_from: the folder of a checkpoint to continue from; everything else must be as it was.
        output: a folder for the SAE, in the format of ``sae_lens.SAE.load_from_disk``.
        options: as for `data_provider`: ``seed``, of the weights and the shuffle, ``shuffle``, ``drop``, ``seqpos`` and
            so on. The batch size of each rank is that of the configuration.

    Raises:
        HookError: the hook is not stored.
        LoaderError: the configuration does not fit the store, or the checkpoint does not fit the configuration.
        MissingExtraError: SAELens is not installed.
        StorageError: the store cannot be read.
    """
    check_installed()
    if "batch_size" in options:
        raise LoaderError(
            "batch_size cannot be set here: it is train_batch_size_samples of the configuration; set it there"
        )
    from sae_lens import TrainingSAE, TrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    if cfg.lr_end is None:
        cfg = replace(cfg, lr_end=cfg.lr / 10)
    if isinstance(sae, TrainingSAEConfig):
        with torch.random.fork_rng():
            torch.manual_seed(options.get("seed", 0))
            sae = TrainingSAE.from_dict(sae.to_dict())
    if not isinstance(sae, TrainingSAE):
        raise LoaderError(
            f"sae is {type(sae).__name__}; give a TrainingSAE or a TrainingSAEConfig of sae_lens"
        )
    output = None if output is None else local_path(output, "the output")
    batch_size = cfg.train_batch_size_samples * options.get("world_size", 1)
    options.setdefault("device", cfg.device)
    with data_provider(store, hook, batch_size=batch_size, **options) as provider:
        trainer = SAETrainer(cfg, sae, provider, save_checkpoint_fn=save_checkpoint_fn(provider))
        if resume_from is not None:
            resume(trainer, provider, resume_from)
        prepare(trainer, provider)
        trained = trainer.fit()
    if output is not None:
        trained.save_inference_model(output)
    return trained
