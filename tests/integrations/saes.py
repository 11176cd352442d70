"""Trainings that stop and resume, in this process or in one of its own: ``python -m tests.integrations.saes``."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

from actstore.facade import Store
from actstore.integrations.saelens import data_provider, prepare, resume, save_checkpoint_fn
from actstore.integrations.saelens.provider import DataProvider, Rows

RESID, MLP, HEADS = "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
D_IN, BATCH = 128, 256
KINDS = ("standard", "topk", "multi")
N_STEPS = 40


class StoppedError(Exception):
    """Raised where the process would be killed."""


@dataclass
class Recorded:
    """A provider that records a checksum of every batch, and stops before one of them."""

    provider: DataProvider
    stop_at: int | None = None
    batches: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        if len(self.batches) == self.stop_at:
            raise StoppedError
        rows = next(self.provider)
        self.batches.append(checksum([rows] if isinstance(rows, torch.Tensor) else list(rows.values())))
        return rows


def checksum(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sae_of(kind: str) -> Any:
    if kind == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=192, k=8))
    return StandardTrainingSAE(
        StandardTrainingSAEConfig(
            d_in=D_IN,
            d_sae=192,
            l1_coefficient=2.0,
            l1_warm_up_steps=30,
            normalize_activations="expected_average_only_in",
        )
    )


def trainer_config(folder: Path | None = None, n_steps: int = N_STEPS) -> SAETrainerConfig:
    """Settings that change from step to step: warm-up, decay, dead features, windows of sparsity."""
    return SAETrainerConfig(
        total_training_samples=n_steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=5,
        lr_decay_steps=20,
        dead_feature_window=3,
        feature_sampling_window=7,
        n_checkpoints=0 if folder is None else 3,
        checkpoint_path=None if folder is None else str(folder),
    )


def train(
    url: str, kind: str, folder: Path, *, stop_at: int | None = None, resume_from: Path | None = None
) -> dict[str, Any]:
    """Train, and return checksums of batches, final weights and counts. With ``stop_at``, it raises `StoppedError`."""
    torch.manual_seed(0)
    hooks: str | list[str] = [RESID, HEADS] if kind == "multi" else RESID
    with data_provider(url, hooks, batch_size=BATCH, seed=3, drop=["bos"]) as provider:
        data = Recorded(provider, stop_at)
        cfg, save = trainer_config(folder), save_checkpoint_fn(provider)
        trainer: Any
        if kind == "multi":
            saes = {"resid": sae_of("standard"), "heads": sae_of("topk")}
            names = {"resid": RESID, "heads": HEADS}
            trainer = MultiSAETrainer(cfg, saes, names, data, save_checkpoint_fn=save)
        else:
            saes = {"": sae_of(kind)}
            trainer = SAETrainer(cfg, saes[""], data, save_checkpoint_fn=save)
        if resume_from is not None:
            resume(trainer, provider, resume_from)
        prepare(trainer, provider)
        trainer.fit()
    parts = trainer.trainers.values() if kind == "multi" else [trainer]
    return {
        "batches": data.batches,
        "weights": {name: checksum(list(sae.state_dict().values())) for name, sae in saes.items()},
        "sparsity": checksum([part.act_freq_scores for part in parts]),
        "n_steps": trainer.n_training_steps,
        "metadata": [part.sae.cfg.metadata.to_dict() for part in parts],
        "checkpoints": sorted(path.name for path in folder.iterdir()),
    }


def values(store: Store, hook: str) -> torch.Tensor:
    """The values of a hook as float32, [n_rows, d_in]."""
    return store[hook][:].float().flatten(0, 1).flatten(1)


def one(rows: Any) -> torch.Tensor:
    """A batch of one hook as a tensor."""
    assert isinstance(rows, torch.Tensor)
    return rows


if __name__ == "__main__":
    url, root = sys.argv[1], Path(sys.argv[2])
    done = {
        kind: train(url, kind, root / kind, resume_from=root / kind / checkpoint)
        for kind, checkpoint in (pair.split("=") for pair in sys.argv[3:])
    }
    print("\n" + json.dumps(done))  # noqa: T201
