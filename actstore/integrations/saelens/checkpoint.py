"""The position in the data, kept beside SAELens' checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from actstore.errors import LoaderError
from actstore.integrations.saelens.preset import parts_of
from actstore.integrations.saelens.provider import DataProvider
from actstore.reason import reason

POSITION: Final = "actstore_position.json"
"""In the folder of a checkpoint."""
_FOLDED: Final = ("expected_average_only_in", "covariance_whitening")
"""Normalisations that SAELens puts into the weights in the end."""


def save_checkpoint_fn(
    provider: DataProvider, then: Callable[[Path | None], None] | None = None
) -> Callable[..., None]:
    """For ``SAETrainer(save_checkpoint_fn=...)``: writes which batch is next into each checkpoint.

    Args:
        provider: where the trainer's batches come from.
        then: called afterwards with the folder of the checkpoint, or with None where SAELens keeps none.
    """

    def save(checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:
            text = json.dumps(provider.state_dict(), indent=2)
            (Path(checkpoint_path) / POSITION).write_text(text, encoding="utf-8")
        if then is not None:
            then(checkpoint_path)

    return save


def resume(trainer: Any, provider: DataProvider, checkpoint: Path | str) -> None:
    """Put a new trainer and its provider where another process was when it wrote a checkpoint.

    Everything that comes is then as if nothing had happened in between: batches, weights and later checkpoints. Call
    `prepare` afterwards: it fills the metadata, and what it would preset is in the checkpoint.

    Args:
        trainer: an ``SAETrainer`` or ``MultiSAETrainer``, made as the one that stopped was.
        provider: made as the one of that trainer was.
        checkpoint: the folder, such as ``checkpoints/4096``.

    Raises:
        LoaderError: the folder is no checkpoint with a position, or it is that of a finished training, or of a trainer
            or of data of another kind. The trainer may then have been changed.
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
    """SAELens would take the weights of any SAE of the same shape."""
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
    """What a checkpoint would silently put in the place of what was asked for."""
    return {
        "lr": trainer.optimizer.param_groups[0]["initial_lr"],
        "steps of warm-up and before the decay": list(trainer.lr_scheduler._milestones),
    }


def _count_step(trainer: Any) -> None:
    """SAELens saves the steps before it counts the one that was just made. Samples are those of a rank, whose part of
    a batch is another one where there is another number of ranks.
    """
    trainer.n_training_steps += 1
    trainer.n_training_samples = trainer.n_training_steps * trainer.cfg.train_batch_size_samples
