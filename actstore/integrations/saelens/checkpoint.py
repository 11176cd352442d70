"""The position in the data, kept beside SAELens' checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from actstore.errors import LoaderError
from actstore.integrations.saelens.preset import parts_of
from actstore.integrations.saelens.provider import DataProvider

POSITION: Final = "actstore_position.json"
"""In the folder of a checkpoint."""
_SCALED: Final = {"expected_average_only_in": "scaling_factor", "covariance_whitening": "whitening"}


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
    parts = [part for part, _ in parts_of(trainer, provider)]
    try:
        position = json.loads((folder / POSITION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoaderError(
            f"{folder} holds no {POSITION} that can be read; name the folder of a checkpoint that a trainer with "
            "save_checkpoint_fn wrote"
        ) from error
    provider.load_state_dict(position)
    try:
        if hasattr(trainer, "trainers"):
            trainer.load_checkpoint(folder)
        else:
            trainer.load_trainer_state(folder)
            trainer.sae.load_weights_from_checkpoint(folder)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise LoaderError(
            f"{folder} cannot be loaded into this trainer: {error}; make it as the one that wrote it"
        ) from error
    for part in parts:
        scaled_by = _SCALED.get(part.sae.cfg.normalize_activations)
        if scaled_by is not None and getattr(part.activation_scaler, scaled_by) is None:
            raise LoaderError(
                f"{folder} is of a finished training: its weights have the normalisation in them, and cannot be "
                "trained further; name an earlier checkpoint"
            )
    for counted in parts if trainer in parts else [*parts, trainer]:
        _count_step(counted)
    trainer.checkpoint_thresholds = [
        samples for samples in trainer.checkpoint_thresholds if samples >= trainer.n_training_samples
    ]


def _count_step(trainer: Any) -> None:
    """SAELens saves the steps before it counts the one that was just made. Samples are those of a rank, whose part of
    a batch is another one where there is another number of ranks.
    """
    trainer.n_training_steps += 1
    trainer.n_training_samples = trainer.n_training_steps * trainer.cfg.train_batch_size_samples
