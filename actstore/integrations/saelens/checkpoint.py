"""Saving the position in the data with SAELens' checkpoints, and resuming from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from actstore.errors import LoaderError
from actstore.integrations.saelens.preset import parts_of
from actstore.integrations.saelens.provider import DataProvider
from actstore.reason import reason

POSITION: Final = "actstore_position.json"
"""Name of the file with the position, in the folder of a checkpoint."""
_FOLDED: Final = ("expected_average_only_in", "covariance_whitening")
"""Normalisations that SAELens folds into the weights at the end of a training."""


def save_checkpoint_fn(
    provider: DataProvider, then: Callable[[Path | None], None] | None = None
) -> Callable[..., None]:
    """Make the argument of ``SAETrainer(save_checkpoint_fn=...)``; it writes the next batch's place to each checkpoint.

    Args:
        provider: the provider of the trainer's batches.
        then: called afterwards with the folder of the checkpoint, or with None if SAELens saves none.
    """

    def save(checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:
            text = json.dumps(provider.state_dict(), indent=2)
            (Path(checkpoint_path) / POSITION).write_text(text, encoding="utf-8")
        if then is not None:
            then(checkpoint_path)

    return save


def resume(trainer: Any, provider: DataProvider, checkpoint: Path | str) -> None:
    """Set a new trainer and its provider to the state of a checkpoint that another process wrote.

    Batches, weights and later checkpoints are then the same as without the interruption. Call `prepare` afterwards: it
    fills in the metadata, and leaves what the checkpoint has set.

    Args:
        trainer: an ``SAETrainer`` or ``MultiSAETrainer``, made like the one that was stopped.
        provider: a provider, made like that of the trainer that was stopped.
        checkpoint: the folder of the checkpoint, such as ``checkpoints/4096``.

    Raises:
        LoaderError: the folder is no checkpoint with a position, or it is one of a finished training, or of another
            kind of trainer or data. The trainer may then have been changed.
    """
    folder = Path(checkpoint)
    is_multi = hasattr(trainer, "trainers")
    parts = [part for part, _ in parts_of(trainer, provider)]
    folders = [folder / name for name in trainer.trainers] if is_multi else [folder]
    try:
        position = json.loads((folder / POSITION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoaderError(
            f"{folder} holds no {POSITION} that can be read; name the folder of a checkpoint that a trainer with "
            "save_checkpoint_fn wrote"
        ) from error
    for part, its_folder in zip(parts, folders, strict=True):
        _check_sae(part, its_folder)
    schedules = [_schedule(part) for part in parts]
    provider.load_state_dict(position)
    try:
        if is_multi:
            trainer.load_checkpoint(folder)
        else:
            trainer.load_trainer_state(folder)
            trainer.sae.load_weights_from_checkpoint(folder)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise LoaderError(
            f"{folder} cannot be loaded into this trainer: {reason(error)}; make it as the one that wrote it"
        ) from error
    for part, ours in zip(parts, schedules, strict=True):
        for name, value in _schedule(part).items():
            if value != ours[name]:
                raise LoaderError(
                    f"{folder} is of a training with {name} {value}, and this one has {ours[name]}; make it as it was"
                )
    for counted in parts if trainer in parts else [*parts, trainer]:
        _count_step(counted)
    trainer.checkpoint_thresholds = [
        samples for samples in trainer.checkpoint_thresholds if samples >= trainer.n_training_samples
    ]


def _check_sae(trainer: Any, folder: Path) -> None:
    """Check the SAE: SAELens would load the weights of any SAE of the same shape."""
    try:
        saved = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoaderError(f"{folder} holds no cfg.json of an SAE; name the folder of a checkpoint") from error
    ours = json.loads(json.dumps(trainer.sae.cfg.to_dict()))
    if saved.get("normalize_activations") == "none" and ours["normalize_activations"] in _FOLDED:
        raise LoaderError(
            f"{folder} is of a finished training: its weights have the normalisation in them, and cannot be trained "
            "further; name an earlier checkpoint"
        )
    for name in ours.keys() & saved.keys() - {"metadata", "device"}:
        if saved[name] != ours[name]:
            raise LoaderError(
                f"{folder} is of an SAE with {name} {saved[name]}, and this one has {ours[name]}; make it as it was"
            )


def _schedule(trainer: Any) -> dict[str, Any]:
    """The settings that loading a checkpoint would silently overwrite."""
    return {
        "lr": trainer.optimizer.param_groups[0]["initial_lr"],
        "steps of warm-up and before the decay": list(trainer.lr_scheduler._milestones),
    }


def _count_step(trainer: Any) -> None:
    """Count a step that SAELens saved uncounted: it saves before it counts. Samples are counted per rank, whose part of
    a batch depends on the number of ranks.
    """
    trainer.n_training_steps += 1
    trainer.n_training_samples = trainer.n_training_steps * trainer.cfg.train_batch_size_samples
