"""Whole rows stay small: one forward takes no more tokens than it can use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actstore import patching
from actstore.hooks.model import HookedModel
from actstore.patching.engine import bounds

TinyModel = Callable[..., Path]


@pytest.mark.parametrize(("at_once", "most"), [(2048, 2 * 6 * 6), (30, 24)])
def test_tokens_of_a_forward_have_a_bound(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, at_once: int, most: int
) -> None:
    """Logits of a large budget would not fit; and no forward, the one for noise included, has more than the cells of a
    layer.
    """
    monkeypatch.setattr(bounds, "_TOKENS_ON_CPU", at_once)
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    corrupted = torch.randint(2, 300, (2, 6), generator=torch.Generator().manual_seed(1))
    sizes: list[int] = []

    def seen(_module: Any, args: Any) -> None:
        sizes.append(args[0].numel())

    handle = model.base.embed_tokens.register_forward_pre_hook(seen)  # type: ignore[union-attr]
    patching.grid(
        model,
        corrupted,
        corrupted.flip(1),
        lambda logits: logits[0, -1, 5],
        engine="whole rows",
        max_tokens=1 << 20,
    )
    handle.remove()
    assert max(sizes) == most
