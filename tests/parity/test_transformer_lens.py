"""The matrix of all hooks that TransformerLens and actstore share, for every family, with and without padding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actstore.hooks.model import HookedModel
from tests.parity import bridge
from tests.parity.families import VARIANTS

TOLERANCE = 5e-5
"""Tolerance relative to a tensor's largest value. TransformerLens computes attention eagerly; ours is the family's
default kernel.
"""

LENGTH = 12
MASKS: dict[str, list[list[int]] | None] = {
    "full": None,
    "left": [[0] * 4 + [1] * 8, [1] * 12],
    "right": [[1] * 12, [1] * 7 + [0] * 5],
}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_common_hook_is_equal(tiny_model: Callable[..., Path], variant: str, padding: str) -> None:
    family, config = VARIANTS[variant]
    folder = tiny_model(family, **config)
    tokens = torch.randint(0, 300, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = MASKS[padding]
    mask = None if rows is None else torch.tensor(rows)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()

    expected_logits, expected = bridge.run(bridge.boot(folder), tokens, mask)
    model = HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")
    logits, cache = model.run_with_cache(tokens, attention_mask=mask)

    assert _error(logits[real], expected_logits[real]) < TOLERANCE
    checked = set()
    for name, value in expected.items():
        if _is_misnamed(model, name) or name.endswith("gate.hook_out"):
            continue
        checked.add(name)
        assert _error(*_comparable(name, cache[name], value, real)) < TOLERANCE, name
    only_ours = set(model.names) - checked
    assert {name.split(".", 2)[-1] for name in only_ours} <= _NOT_IN_BRIDGE | set(
        bridge.MISNAMED.get(family, ())
    )
    for name in only_ours & {f"blocks.{layer}.mlp.hook_expert_weights" for layer in range(3)}:
        # The Bridge returns the logits of the router, and no probabilities.
        router = expected[name.replace("hook_expert_weights", "gate.hook_out")].softmax(-1)
        assert _error(cache[name][real], router[real]) < TOLERANCE, name
        indices = cache[name.replace("weights", "indices")]
        assert torch.equal(indices[real], router.topk(2, dim=-1).indices[real]), name


_NOT_IN_BRIDGE = {
    "attn.hook_result",  # behind a switch there; tests/hooks compares it with z and W_O
    # Behind switches there.
    "hook_mlp_in",
    "hook_attn_in",
    "hook_q_input",
    "hook_k_input",
    "hook_v_input",
    "ln1.hook_out",
    "ln2.hook_out",
    "mlp.hook_expert_weights",
    "mlp.hook_expert_indices",
    # The Bridge of GPT-J, GPT-NeoX and Phi-3 lacks them.
    "attn.hook_rot_q",
    "attn.hook_rot_k",
}


def _is_misnamed(model: HookedModel, name: str) -> bool:
    """Whether the Bridge uses this name for something else; the reasons are in `bridge.MISNAMED`."""
    leaf = name.split(".", 2)[-1]
    return leaf in bridge.MISNAMED.get(model.cfg.model_type, ()) and (
        leaf.startswith("attn.") or name not in model.names
    )


def _comparable(name: str, ours: Tensor, theirs: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The entries that are comparable: without those at padding, and without scores that are masked."""
    theirs = theirs.expand_as(ours)
    if name.endswith(("hook_pattern", "hook_attn_scores")):
        ours, theirs = ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real]
        seen = ours.isfinite()
        return ours[seen], theirs[seen]
    return ours[real], theirs[real]


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
