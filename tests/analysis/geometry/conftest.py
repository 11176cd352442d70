"""Stores for the tests of geometry: a real one with covariances and a kept column, and one of a changed model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import actstore
from actstore.analysis.scanning import unit
from actstore.facade import Store


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks and units, so that a small store has many."""
    monkeypatch.setattr(unit, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(unit, "_UNIT_ROWS", 96)


def extracted(folder: Path, model: Path, **fields: Any) -> Store:
    """A store of 60 labelled documents of different lengths."""
    words = ("tea", "time", "river", "stone", "lamp")
    random = np.random.default_rng(3)
    lines = [
        {
            "text": " ".join(random.choice(words, 4 + i % 9)),
            "label": ("verse", "prose")[i % 2],
            "year": 1600 + i,
        }
        for i in range(60)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "documents.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    job = actstore.plan(
        model=str(model),
        tokens=str(source),
        packing="document",
        keep=["label", "year"],
        context_length=64,
        batch_size=8,
        pad_token=0,
        **({"hooks": ["blocks.*.hook_resid_post", "blocks.1.attn.hook_z"]} | fields),
        out=str(folder / "store"),
    )
    actstore.extract(job)
    return actstore.open(str(folder / "store"))


@pytest.fixture(scope="package")
def real_store(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Of a small model, with covariances."""
    return extracted(tmp_path_factory.mktemp("real"), tiny_model("gpt2"), covariance=True)


@pytest.fixture(scope="package")
def changed_store(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Of the same model with changed weights, over the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_model("gpt2")
    folder = tmp_path_factory.mktemp("changed")
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "model")
    return extracted(folder, folder / "model")


def real_rows(store: Store, hook: str, n_sequences: int = 60) -> NDArray[np.float64]:
    """Rows of real tokens of a hook in the first sequences, [n_rows, size], in float64."""
    lengths = np.asarray(store.lengths[:n_sequences])
    values = store[hook][:n_sequences].double().flatten(2).numpy()
    rows: NDArray[np.float64] = values[np.arange(values.shape[1]) < lengths[:, None]]
    return rows
