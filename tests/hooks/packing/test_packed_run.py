"""Packed runs beside other calls of the model, and with many rows that attend to long prefixes."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore import patching
from actstore.hooks.model import HookedModel
from actstore.hooks.packing import packed_run
from actstore.hooks.packing.packed_run import PackedRun

TinyModel = Callable[..., Path]


def prompts() -> tuple[Tensor, Tensor]:
    corrupted = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    clean = corrupted.clone()
    clean[:, 4] = 7
    return clean, corrupted


def last_logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 5]


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_another_thread_may_call_the_plain_model_meanwhile(tiny_model: TinyModel, family: str) -> None:
    """It gets its own logits, and leaves no trace in the run: whenever the final norm runs, another thread calls."""
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model(family)).eval()
    clean, corrupted = prompts()
    with torch.no_grad():
        expected_logits = plain(clean).logits
    expected = patching.grid(HookedModel(plain), corrupted, clean, last_logit, "z", positions=-1)
    model = HookedModel(plain)  # has not yet found out what its layers return
    outputs: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            outputs.append(plain(clean).logits)

    main = threading.get_ident()

    norm = plain.base_model.ln_f if family == "gptj" else plain.base_model.norm
    forward = norm.forward

    def beside(stream: Tensor) -> Tensor:
        if threading.get_ident() == main:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        normed: Tensor = forward(stream)
        return normed

    norm.forward = beside
    result = patching.grid(model, corrupted, clean, last_logit, "z", positions=-1)
    del norm.forward
    assert torch.equal(result.values, expected.values)
    assert result.engine == "packed rows"
    assert len(outputs) >= 3
    for output in outputs:
        torch.testing.assert_close(output, expected_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("hook", "axes"),
    [
        ("z", ("layer", "pos", "head")),
        ("k", ("layer", "pos")),
        ("pattern", ("layer", "head", "dest_pos")),
        ("attn_scores", ("layer", "head")),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_few_rows_attend_at_once(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, family: str, hook: str, axes: tuple[str, ...]
) -> None:
    """Keys and values of rows that share a prefix are joined to it for some rows at a time, whatever the budget."""
    model = HookedModel.from_pretrained(tiny_model(family), dtype="float32", device="cpu")
    clean, corrupted = prompts()
    expected = patching.grid(model, corrupted, clean, last_logit, hook, axes, positions=-1)
    monkeypatch.setattr(packed_run, "_SOURCES_AT_ONCE", 20)
    sources: list[int] = []
    original = PackedRun._mixed

    def counted(self: PackedRun, layer: int, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        sources.append(key.shape[0] * key.shape[2])
        return original(self, layer, query, key, *rest)

    monkeypatch.setattr(PackedRun, "_mixed", counted)
    result = patching.grid(model, corrupted, clean, last_logit, hook, axes, positions=-1)
    assert max(sources) <= 20
    torch.testing.assert_close(result.values, expected.values, atol=1e-5, rtol=0)
