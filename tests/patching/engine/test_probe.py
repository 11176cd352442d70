"""Models for which packed rows would be wrong are noticed before any cell is computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore import patching
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]

JOINS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum-of-earlier": lambda hidden: hidden.cumsum(1) / 10,
    "one-before": lambda hidden: torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1],
    "mean": lambda hidden: hidden.mean(1, keepdim=True),
    "first-only": lambda hidden: hidden * (torch.arange(hidden.shape[1]) == 0)[:, None],
}
"""What a layer may add that attention does not, from its input [prompt, position, d_model]."""


def prompts(length: int) -> tuple[Tensor, Tensor]:
    """(clean, corrupted) prompts that differ from the first position on."""
    corrupted = torch.randint(2, 300, (1, length), generator=torch.Generator().manual_seed(1))
    clean = corrupted.clone()
    clean[0, 0] = 7
    return clean, corrupted


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("join", JOINS)
def test_joined_positions_show_in_one_prompt_that_differs_from_its_start(
    tiny_model: TinyModel, join: str, position: int
) -> None:
    """Unpatched rows would be the first to be packed, and have what they have in the whole forward."""
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    module = plain.base_model.layers[1].mlp
    forward = module.forward
    module.forward = lambda hidden: forward(hidden) + JOINS[join](hidden)
    model = HookedModel(plain, check=False)
    for length in (2, 6, 40):
        clean, corrupted = prompts(length)
        result = patching.grid(
            model, corrupted, clean, lambda logits: logits[0, -1, 5], axes=("layer",), positions=position
        )
        slow = patching.grid(
            model,
            corrupted,
            clean,
            lambda logits: logits[0, -1, 5],
            axes=("layer",),
            positions=position,
            engine="whole rows",
        )
        torch.testing.assert_close(result.values, slow.values)
        assert result.engine.startswith("whole rows: unpatched rows ended"), length


@pytest.mark.parametrize(
    ("family", "config"),
    [("gemma3_text", {"use_bidirectional_attention": True}), ("llama", {"is_causal": False})],
)
def test_attention_to_later_positions_runs_as_whole_rows(
    tiny_model: TinyModel, family: str, config: dict[str, Any]
) -> None:
    """An edit changes logits before it, where packed rows have none."""
    model = HookedModel.from_pretrained(tiny_model(family, **config), dtype="float32", device="cpu")
    _, corrupted = prompts(7)
    clean = corrupted.clone()
    clean[0, 5] = 7
    result = patching.grid(model, corrupted, clean, lambda logits: logits[0, 2, 5])
    assert (result.difference[0, 5]).abs() > 1e-4
    assert result.engine == (
        f"whole rows: positions of this {family} model see later ones, and packed rows begin where they change"
    )
