"""The functions have the results of ``transformer_lens.patching``, which runs on our model and on TransformerLens'."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actstore import patching
from actstore.errors import HookError, ModelError, PatchError, TokensError
from actstore.hooks.model import HookedModel
from tests.parity import bridge

TinyModel = Callable[..., Path]
NAMES = [name for name in patching.__all__ if name.startswith("get_act_patch") and "every" not in name]
CORRUPTED = torch.randint(2, 300, (1, 6), generator=torch.Generator().manual_seed(4))
CLEAN = torch.where(torch.arange(6) == 2, 17, CORRUPTED)


def difference(logits: Tensor) -> Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 6]).mean()


@pytest.fixture(scope="module")
def theirs() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import patching as module
    return module


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_each_function_is_that_of_transformer_lens(tiny_model: TinyModel, theirs: Any, family: str) -> None:
    """Theirs runs one forward for every cell, on our model; keys and values are grouped in two of the families."""
    model = HookedModel.from_pretrained(tiny_model(family), dtype="float32", device="cpu")
    _, cache = model.run_with_cache(CLEAN)
    for name in [*NAMES, "get_act_patch_attn_head_all_pos_every", "get_act_patch_block_every"]:
        if not hasattr(theirs, name) or "src_pos" in name:
            continue
        if "resid_mid" in name and model.cfg.parallel_attn_mlp:
            continue  # there is no such stream
        expected = getattr(theirs, name)(model, CORRUPTED, cache, difference)
        values = getattr(patching, name)(model, CORRUPTED, cache, difference)
        torch.testing.assert_close(values, expected, atol=1e-4, rtol=0, msg=name)
        assert (values != difference(model(CORRUPTED))).any()


def test_results_are_those_of_the_model_of_transformer_lens(tiny_model: TinyModel, theirs: Any) -> None:
    """Nothing of ours on the other side: their functions on their Bridge."""
    folder = tiny_model("gpt2")
    model, their_model = HookedModel.from_pretrained(folder, dtype="float32"), bridge.boot(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, their_cache = their_model.run_with_cache(CLEAN)
        for name in (
            "get_act_patch_resid_pre",
            "get_act_patch_mlp_out",
            "get_act_patch_attn_head_out_all_pos",
        ):
            expected = getattr(theirs, name)(their_model, CORRUPTED, their_cache, difference)
            values = getattr(patching, name)(model, CORRUPTED, CLEAN, difference)
            torch.testing.assert_close(values, expected, atol=1e-4, rtol=0, msg=name)


def test_their_names_and_arguments_are_here(theirs: Any) -> None:
    """All that a notebook can import from their module, or pass by name."""
    public = {
        name
        for name, value in vars(theirs).items()
        if callable(value) and name.startswith(("get_act", "generic", "layer_", "make_df"))
    }
    assert public <= set(patching.__all__)
    for name in ("generic_activation_patch", "make_df_from_ranges", "layer_pos_patch_setter"):
        assert [*inspect.signature(getattr(patching, name)).parameters] == [
            *inspect.signature(getattr(theirs, name)).parameters
        ]


def test_a_setter_of_ones_own(tiny_model: TinyModel, theirs: Any) -> None:
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    _, cache = model.run_with_cache(CLEAN)

    def half(value: Tensor, index: Any, clean: Tensor) -> Tensor:
        value[:, int(index[1])] = (value[:, int(index[1])] + clean[:, int(index[1])]) / 2
        return value

    arguments = (model, CORRUPTED, cache, difference, half, "resid_pre", ("layer", "pos"))
    values, table = patching.generic_activation_patch(*arguments, return_index_df=True)
    expected, their_table = theirs.generic_activation_patch(*arguments, return_index_df=True)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
    assert table.equals(their_table)
    some = table.iloc[[3, 8]]
    chosen = patching.generic_activation_patch(*arguments[:-1], index_df=some)
    torch.testing.assert_close(chosen, values.flatten()[[3, 8]])
    # Each hook has its own number of heads.
    setter = patching.layer_head_vector_patch_setter
    keys = patching.get_act_patch_attn_head_k_all_pos(model, CORRUPTED, cache, difference)
    for name in ("k", "rot_k"):
        by_head = patching.generic_activation_patch(
            model, CORRUPTED, cache, difference, setter, name, ("layer", "head")
        )
        torch.testing.assert_close(by_head, keys, atol=1e-5, rtol=0)
    with pytest.raises(PatchError, match="either index_axis_names"):
        patching.generic_activation_patch(*arguments[:-1])


def test_errors_say_what_does_not_fit(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(tiny_model("gpt2"), dtype="float32", device="cpu")
    _, cache = model.run_with_cache(CLEAN, names_filter="blocks.0.hook_resid_pre")
    with pytest.raises(
        HookError, match=r"the clean cache lacks 2 of 3 values, the first is blocks\.1\.hook_resid"
    ):
        patching.grid(model, CORRUPTED, cache, difference)
    with pytest.raises(
        PatchError, match="the clean prompts are 1 of 5 tokens, and the corrupted ones 1 of 6"
    ):
        patching.grid(model, CORRUPTED, CLEAN[:, 1:], difference)
    with pytest.raises(PatchError, match=r"axes is \['layer', 'head'\].* for hook_resid_pre"):
        patching.grid(model, CORRUPTED, CLEAN, difference, axes=("layer", "head"))
    with pytest.raises(PatchError, match=r"the metric gave shape \[1, 6\] for logits"):
        patching.grid(model, CORRUPTED, CLEAN, lambda logits: logits[..., 0])
    with pytest.raises(PatchError, match="positions holds 6; the prompts have positions 0 to 5"):
        patching.grid(model, CORRUPTED, CLEAN, difference, positions=6)
    with pytest.raises(HookError, match="outside of the layers"):
        patching.grid(model, CORRUPTED, CLEAN, difference, "hook_embed")
    with pytest.raises(HookError, match="runs its own model"):
        patching.grid(model, CORRUPTED, CLEAN, lambda _logits: difference(model(CLEAN)))
    with pytest.raises(PatchError, match="the corrupted prompts have 2 to 4 tokens"):
        patching.grid(model, ["z", "zqx"], ["zqx", "z"], difference)
    with pytest.raises(TokensError, match="is outside of the 300 ids of this model"):
        patching.grid(model, CORRUPTED + 300, CLEAN, difference)
    with pytest.raises(TokensError, match=r"expected token ids .* of shape \(1, 0\)"):
        patching.grid(model, CORRUPTED[:, :0], CLEAN[:, :0], difference)
    headless = HookedModel.from_pretrained(tiny_model("gpt2"), has_head=False)
    with pytest.raises(ModelError, match="loaded without its head"):
        patching.grid(headless, CORRUPTED, CLEAN, difference)
