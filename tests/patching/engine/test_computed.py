"""The engine that is chosen fits the model as it is when it is called."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore import patching
from actstore.errors import ModelError
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
CORRUPTED = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(4))
CLEAN = torch.where((torch.arange(9) == 2) | (torch.arange(9) == 5), 17, CORRUPTED)


def last_logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 5]


@pytest.mark.parametrize("layer", [0, 2], ids=["first-layer", "last-layer"])
def test_pytorch_hooks_of_others_see_whole_prompts(tiny_model: TinyModel, layer: int) -> None:
    """What they do at a position is part of every cell, also in the last layer, where nothing else would show it."""
    folder = tiny_model("llama")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    # The model is known to run as packed rows when the hook comes.
    assert patching.grid(model, CORRUPTED, CLEAN, last_logit, positions=-1).engine == "packed rows"

    def of_one_position(_module: Any, _args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 2] = 1.0
        return out

    streams: list[Tensor] = []
    plain.model.layers[layer].mlp.register_forward_hook(of_one_position)
    handles = [
        one.register_forward_pre_hook(lambda _module, args: streams.append(args[0].clone()))
        for one in plain.model.layers
    ]
    with torch.no_grad():
        plain(CLEAN)
        for handle in handles:
            handle.remove()
        expected = torch.empty(2, 3, 9)
        for patched in range(3):
            for position in range(9):

                def put(_module: Any, args: Any, patched: int = patched, position: int = position) -> Any:
                    args[0][:, position] = streams[patched][:, position]

                handle = plain.model.layers[patched].register_forward_pre_hook(put)
                expected[:, patched, position] = last_logit(plain(CORRUPTED).logits)
                handle.remove()
    handle = model.layers[layer].mlp.register_forward_hook(of_one_position)
    result = patching.grid(model, CORRUPTED, CLEAN, last_logit, positions=-1)
    torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=0)
    name = f"model.layers.{layer}.mlp"
    assert result.engine == f"whole rows: there is a PyTorch hook on {name}, which expects whole prompts"
    with pytest.raises(ModelError, match=f"PyTorch hook on {name}"):
        patching.grid(model, CORRUPTED, CLEAN, last_logit, engine="packed rows")
    with pytest.raises(ModelError, match=f"PyTorch hook on {name}, and edges are those of the model alone"):
        patching.edge_scores(model, CORRUPTED, CLEAN, last_logit)
    handle.remove()
    assert patching.grid(model, CORRUPTED, CLEAN, last_logit, positions=-1).engine == "packed rows"


def test_hooks_of_transformers_itself_change_nothing(tiny_model: TinyModel) -> None:
    """It leaves some on the layers once somebody has asked for hidden states."""
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    model.hf(CORRUPTED, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.hf.modules())
    assert patching.grid(model, CORRUPTED, CLEAN, last_logit).engine == "packed rows"
