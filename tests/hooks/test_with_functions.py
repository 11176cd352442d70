"""Functions that stay on hooks, and what notebooks set before they add some."""

from typing import Any, Literal

import pytest
from torch import Tensor

from actstore.errors import HookError, ModelError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from tests.hooks.test_model import POST, TOKENS, TinyModel, has_hooks, load


@pytest.fixture
def llama(tiny_model: TinyModel) -> HookedModel:
    return load(tiny_model("llama"))


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_permanent_functions_stay_until_they_are_named(
    llama: HookedModel, direction: Literal["fwd", "bwd"]
) -> None:
    other: Literal["fwd", "bwd"] = "bwd" if direction == "fwd" else "fwd"
    calls: list[str] = []
    point = llama.hook_dict[POST]

    def calling(what: str) -> Any:
        return lambda value, hook: calls.append(what)

    llama.add_perma_hook(POST, calling("permanent"), direction)
    point.add_hook(calling("plain"), direction)
    llama.add_hook(POST, calling("level 2"), direction, level=2)
    llama.add_hook(POST, calling("first"), direction, prepend=True)
    assert [function.is_permanent for function in getattr(point, f"{direction}_hooks")] == [
        False,
        True,
        False,
        False,
    ]
    assert repr(point) == f"HookPoint(name={POST!r}, 4 {direction})"
    assert point.has_hooks(direction, level=2)
    assert not point.has_hooks(direction, level=3)
    assert not point.has_hooks(other)
    assert llama.has_functions

    def called() -> list[str]:
        calls.clear()
        loss = llama(TOKENS, "loss")
        if loss.requires_grad:
            loss.backward()
        return list(calls)

    assert called() == ["first", "permanent", "plain", "level 2"]
    llama.reset_hooks(level=2)
    assert called() == ["first", "permanent", "plain"]
    llama.reset_hooks(direction=other)
    point.remove_hooks(other, including_permanent=True)
    assert called() == ["first", "permanent", "plain"]
    llama.reset_hooks()
    assert called() == ["permanent"]
    assert point.has_hooks()
    assert not point.has_hooks(including_permanent=False)
    with pytest.raises(HookError, match="a direct call of the Hugging Face model"):
        llama.hf(TOKENS)
    point.remove_hooks("both", including_permanent=True)
    assert called() == []
    assert not llama.has_functions
    llama.hf(TOKENS)
    assert not has_hooks(llama)


def test_functions_of_both_directions_share_their_hook(llama: HookedModel) -> None:
    def count(value: Tensor, hook: HookPoint) -> None:
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1

    with llama.hooks([(POST, count)], [(POST, count)], clear_contexts=True):
        point = llama.hook_dict[POST]
        assert (len(point.fwd_hooks), len(point.bwd_hooks)) == (1, 1)
        llama(TOKENS, "loss").backward()
        assert point.ctx == {"n": 2}
    assert point.ctx == {}
    assert not llama.has_functions
    with (
        pytest.raises(HookError, match="matches nothing"),
        llama.hooks([(POST, count)], [("hook_nothing", count)]),
    ):
        pass
    assert not llama.has_functions


def test_contexts_of_functions(llama: HookedModel) -> None:
    def count(value: Tensor, hook: HookPoint) -> None:
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1

    llama.add_hook(POST, count)
    llama(TOKENS)
    llama.reset_hooks(clear_contexts=False)
    assert llama.hook_dict[POST].ctx == {"n": 1}
    llama.reset_hooks()
    assert llama.hook_dict[POST].ctx == {}


def test_a_direction_that_is_none(llama: HookedModel) -> None:
    with pytest.raises(HookError, match="dir is 'forward'; choose 'fwd'"):
        llama.add_hook(POST, lambda value, hook: None, dir="forward")  # type: ignore[arg-type]
    with pytest.raises(HookError, match="dir is 'both'"):
        llama.add_hook(POST, lambda value, hook: None, dir="both")  # type: ignore[arg-type]
    with pytest.raises(HookError, match="dir is 'forward'"):
        llama.reset_hooks(direction="forward")  # type: ignore[arg-type]


def test_what_turns_hooks_on_elsewhere(llama: HookedModel) -> None:
    llama.set_use_attn_result(True)
    llama.set_use_hook_mlp_in(True)
    llama.cfg.use_attn_result = False
    assert llama.cfg.use_hook_mlp_in
    _, cache = llama.run_with_cache(TOKENS)
    assert cache["result", 1].shape == (*TOKENS.shape, llama.cfg.n_heads, llama.cfg.d_model)
    llama.enable_compatibility_mode(no_processing=True)
    with pytest.raises(ModelError, match="fold_ln is not offered, since weights stay as the model has them"):
        llama.enable_compatibility_mode()
    with pytest.raises(ModelError, match="center_unembed is not offered"):
        llama.enable_compatibility_mode(fold_ln=False, center_writing_weights=False)
    llama.set_ungroup_grouped_query_attention(False)
    with pytest.raises(ModelError, match="query head h reads key head"):
        llama.set_ungroup_grouped_query_attention(True)
