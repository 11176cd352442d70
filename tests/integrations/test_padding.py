"""Trainers never see the padding of stores."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import actstore
from actstore.facade import Store
from actstore.integrations.dictionary_learning import activations
from actstore.integrations.saelens import data_provider, prepare
from tests.conftest import TinyModel
from tests.integrations.saes import Recorded, one

HOOK, D_MODEL, BATCH = "blocks.1.hook_resid_post", 64, 16
BOS, EOS, SEP = 0, 1, 42
"""Token ids of the configuration; the separator is a token that the text contains, too."""


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel, text_file: Path) -> Store:
    """A store with one paragraph per row, after eos, padded with eos."""
    out = tmp_path_factory.mktemp("padded") / "store"
    job = actstore.plan(
        model=str(tiny_model("llama", sep_token_id=SEP)),
        tokens=str(text_file),
        documents="paragraph",
        hooks=[HOOK],
        context_length=64,
        max_tokens=40 * 64,
        packing="document",
        truncate="right",
        begin_batch_token="eos",
        out=str(out),
    )
    actstore.extract(job)
    return actstore.open(str(out))


def kept(store: Store, without: list[int]) -> NDArray[np.bool_]:
    """True for real positions with other tokens, [n_sequences, context_length]."""
    is_real = np.arange(store.shape[1]) < store.lengths[:][:, None]
    return is_real & ~np.isin(store.tokens[:], without)


@pytest.mark.parametrize(
    ("drop", "without"),
    [([], []), ("eos", [EOS]), (["sep"], [SEP]), (["bos", "eos", "sep", 50], [BOS, EOS, SEP, 50])],
)
def test_padding_never_appears(padded: Store, drop: Any, without: list[int]) -> None:
    tokens, lengths = padded.tokens[:], padded.lengths[:]
    is_real = kept(padded, [])
    assert (tokens[:, 0] == EOS).all()  # not padding
    assert (tokens[~is_real] == EOS).all()
    assert lengths.min() < 40
    assert (tokens[is_real] == SEP).any()
    left = kept(padded, without)
    n_batches = int(left.sum()) // BATCH
    cfg = SAETrainerConfig(
        total_training_samples=2 * n_batches * BATCH, train_batch_size_samples=BATCH, lr=1e-3, lr_end=1e-4
    )
    seen: list[torch.Tensor] = []

    class Kept(Recorded):
        def __next__(self) -> torch.Tensor:
            seen.append(one(super().__next__()))
            return seen[-1]

    with data_provider(padded, HOOK, batch_size=BATCH, drop=drop) as provider:
        assert provider.loader.n_rows == left.sum()
        assert provider.loader.n_batches == n_batches
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=64, k=4))
        trainer = SAETrainer(cfg, sae, Kept(provider))
        prepare(trainer, provider)
        trainer.fit()
    assert len(seen) == 2 * n_batches
    rows = Counter(row.tobytes() for row in padded[HOOK][:].float().numpy()[left])
    for epoch in (seen[:n_batches], seen[n_batches:]):
        counts = Counter(row.tobytes() for row in torch.cat(epoch).numpy())
        assert counts <= rows
        assert rows.total() - counts.total() == left.sum() % BATCH


def test_nor_in_data_for_dictionary_learning(padded: Store) -> None:
    with activations(padded, HOOK, batch_size=BATCH, drop="bos") as data:
        assert data.loader.state_dict()["order"]["n_rows"] == kept(padded, [BOS]).sum()
