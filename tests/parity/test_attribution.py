"""Attribution code of TransformerLens' users gives the true shares: those of its compatibility mode, of `logit_attrs`,
and of a finite difference.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from actstore.errors import TokensError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from tests.parity import bridge
from tests.parity.families import FAMILIES
from tests.parity.test_workflows import IOI, load, silent

TinyModel = Callable[..., Path]

TOLERANCE: Final = 5e-5
"""Tolerance relative to the largest value."""
LENGTH: Final = 8


def tokens_of(seed: int, *shape: int) -> Tensor:
    return torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(seed))


def shares(model: Any, cache: Any, stack: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Each part's share of the logit difference as in TransformerLens' notebook on indirect objects, [part, row]."""
    directions = model.tokens_to_residual_directions(right) - model.tokens_to_residual_directions(wrong)
    scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    return torch.einsum("prd,rd->pr", scaled, directions)


def shares_by_columns(model: Any, cache: Any, stack: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """The shares computed with columns of the matrix."""
    scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    columns = model.W_U[:, right] - model.W_U[:, wrong]  # [d_model, row]
    return torch.stack([scaled[:, row] @ columns[:, row] for row in range(len(right))], dim=1)


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE, (what, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_code_of_their_users_gives_the_shares_of_compatibility_mode(
    tiny_model: TinyModel, family: str
) -> None:
    # Folding value biases that several heads share fails in the Bridge of 3.9.
    folder = tiny_model(family, **({"num_key_value_heads": 4} if family == "phi" else {}))
    model = load(folder)
    tokens, (right, wrong) = tokens_of(3, 2, LENGTH), tokens_of(4, 2, 2)
    _, cache = model.run_with_cache(tokens)
    booted: Any = bridge.boot(folder)
    with silent():
        booted.enable_compatibility_mode(disable_warnings=True)
        _, theirs = booted.run_with_cache(tokens)
    calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("decompose_resid", {"layer": -1}, {}),
        ("accumulated_resid", {"layer": -1}, {}),
    ]
    if model.architecture.ln1_post is None:  # otherwise a norm is between the heads and the stream
        calls.append(("stack_head_results", {"layer": -1}, {"fold_value_biases": True}))
    for name, arguments, ours_only in calls:
        stack = getattr(cache, name)(**arguments, **ours_only, pos_slice=-1)
        with silent():
            expected = shares(booted, theirs, getattr(theirs, name)(**arguments, pos_slice=-1), right, wrong)
        for way in (shares, shares_by_columns):
            assert_near(way(model, cache, stack, right, wrong), expected, name)
        assert_near(cache.logit_attrs(stack, right, wrong, pos_slice=-1), expected, name)


def test_directions_have_their_shapes(tiny_model: TinyModel) -> None:
    folder = tiny_model("gpt2")
    model, booted = load(folder), bridge.boot(folder)
    text = "a"
    token = model.to_single_token(text)
    given: list[Any] = [5, token, torch.tensor(5), torch.tensor([5]), torch.tensor([[5]])]
    for tokens in [*given, tokens_of(1, 3), tokens_of(1, 2, 3)]:
        assert torch.equal(
            model.tokens_to_residual_directions(tokens), booted.tokens_to_residual_directions(tokens)
        )
    assert torch.equal(model.tokens_to_residual_directions(text), model.W_U[:, token])
    for wrong in (1.5, [True], 300, -1, "two words", None):
        with pytest.raises(TokensError):
            model.tokens_to_residual_directions(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_share_is_what_the_logit_changes_by(tiny_model: TinyModel, family: str) -> None:
    """A tenth more of one part, with the scale held, changes the logits by a tenth of the part's share."""
    model = load(tiny_model(family))
    tokens, step = tokens_of(3, 2, LENGTH), 1e-1
    logits, cache = model.run_with_cache(tokens)
    part = cache["attn_out", 1]
    scale = cache["ln_final.hook_scale"]

    def more(value: Tensor, hook: HookPoint) -> Tensor:
        return value + step * part

    def held(_value: Tensor, hook: HookPoint) -> Tensor:
        return scale

    moved = model.run_with_hooks(
        tokens, fwd_hooks=[(("resid_post", -1), more), ("ln_final.hook_scale", held)]
    )
    cap = model.cfg.output_logits_soft_cap
    if cap is not None:
        logits, moved = (cap * (value.double() / cap).atanh() for value in (logits, moved))
    for token in (5, 77):
        share = cache.logit_attrs(part[None], token)[0]
        change = (moved - logits)[..., token] / step
        assert float((share - change).abs().max() / change.abs().max()) < 2e-3


def test_the_head_that_moves_the_name(smollm2: Path) -> None:
    """Head 3 of layer 23, as in the page on indirect objects."""
    model = load(smollm2)
    tokens = model.to_tokens(IOI)
    right = torch.tensor([model.to_single_token(name) for name in (" John", " Mary")])
    _, cache = model.run_with_cache(tokens)
    heads, labels = cache.stack_head_results(pos_slice=-1, return_labels=True)
    index = labels.index("L23H3")
    expected = cache.logit_attrs(heads, right, right.flip(0), pos_slice=-1)
    for way in (shares, shares_by_columns):
        actual = way(model, cache, heads, right, right.flip(0))
        assert_near(actual, expected, way.__name__)
        assert float(actual[index].mean()) == pytest.approx(2.44, abs=0.01)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_value_biases_are_in_heads_unless_folded(tiny_model: TinyModel, family: str) -> None:
    """With raw weights, a head adds z @ W_O; either way, all parts add up to the logit."""
    model: HookedModel = load(tiny_model(family))
    tokens = tokens_of(3, 2, LENGTH)
    logits, cache = model.run_with_cache(tokens)
    raw, folded = (cache.stack_head_results(fold_value_biases=fold) for fold in (False, True))
    constant = [block.attn.b_V + block.ln1.b @ block.attn.W_V for block in model.blocks]
    biases = torch.einsum("lhe,lhed->lhd", torch.stack(constant), model.W_O).flatten(0, 1)[:, None, None]
    torch.testing.assert_close(raw - folded, biases.expand_as(raw), atol=1e-5, rtol=1e-4)
    assert biases.abs().max() > 0.01
    for fold in (False, True):
        parts = cache.get_full_resid_decomposition(expand_neurons=False, fold_value_biases=fold)
        total = cache.logit_attrs(parts, tokens).sum(0) + model.folded_b_U[tokens]
        torch.testing.assert_close(total, logits.gather(-1, tokens[..., None])[..., 0], atol=1e-4, rtol=1e-4)
        heads = cache.stack_head_results(incl_remainder=True, fold_value_biases=fold)
        torch.testing.assert_close(heads.sum(0), cache["resid_post", -1], atol=1e-5, rtol=1e-4)
