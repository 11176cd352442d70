"""Arguments of a grid that mean nothing are errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actstore import patching
from actstore.errors import HookError, PatchError
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]


def first_logit(logits: Tensor) -> Tensor:
    return logits[0, -1, 5]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "engine": ({"engine": "whole"}, "engine is 'whole'; choose 'packed rows' or 'whole rows'"),
    "axes": ({"axes": ("layer", "neuron")}, r"axes is \['layer', 'neuron'\]; give 'layer' first"),
    "positions": ({"positions": 5}, "positions holds 5; the prompts have positions 0 to 4"),
    "weights of experts": (
        {"hook": "mlp.hook_expert_weights"},
        "mlp.hook_expert_weights can be read but not changed; patch the input or the output of the MLP",
    ),
    "numbers of experts": ({"hook": "mlp.hook_expert_indices"}, "can be read but not changed"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_shows_before_a_prompt_runs(tiny_model: TinyModel, kind: str) -> None:
    model = HookedModel.from_pretrained(tiny_model("mixtral"), dtype="float32", device="cpu")
    ids = torch.arange(2, 7)[None]
    arguments, message = WRONG[kind]
    forwards: list[object] = []
    handle = model.base.register_forward_pre_hook(lambda *_: forwards.append(None))
    calls: list[Callable[[], object]] = [
        lambda: patching.grid(model, ids, ids, first_logit, **arguments),
        lambda: patching.ablate(model, ids, first_logit, value="mean", **arguments),
    ]
    for call in calls:
        with pytest.raises((PatchError, HookError), match=message):
            call()
    handle.remove()
    assert not forwards


@pytest.mark.parametrize(
    ("hook", "axes"), [("pattern", ("layer", "pos", "dest_pos")), ("z", ("layer", "head", "head_index"))]
)
def test_two_names_of_one_axis_are_an_error(tiny_model: TinyModel, hook: str, axes: tuple[str, ...]) -> None:
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    ids = torch.arange(2, 7)[None]
    with pytest.raises(PatchError, match=f"{axes[1]} and {axes[2]} are the same axis"):
        patching.grid(model, ids, ids, first_logit, hook, axes)


@pytest.mark.parametrize("hook", ["ln1.hook_scale", "result", "pattern", "ln2.hook_normalized"])
def test_a_grid_in_inference_mode_is_that_outside(tiny_model: TinyModel, hook: str) -> None:
    """Values that are computed for a hook alone keep no count of edits there."""
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    corrupted = torch.randint(2, 300, (1, 6), generator=torch.Generator().manual_seed(1))
    clean = corrupted.flip(1)
    expected = patching.grid(model, corrupted, clean, first_logit, hook, ("layer",))
    with torch.inference_mode():
        for engine in ("packed rows", "whole rows"):
            result = patching.grid(model, corrupted, clean, first_logit, hook, ("layer",), engine=engine)
            torch.testing.assert_close(result.values, expected.values, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.1.hook_resid_pre", r"is the hook of one layer.* give 'blocks\.\*\.hook_resid_pre'"),
        ("resid_per", r"hook 'blocks\.\*\.hook_resid_per' matches nothing .* are blocks\.\*\.hook_resid_"),
        ("hook_embed", "outside of the layers"),
        ("expert_weights", "has no experts"),
        (3, "hook is 3; a grid patches a hook in every layer"),
    ],
)
def test_a_hook_that_is_not_one_of_every_layer_is_an_error(
    tiny_model: TinyModel, hook: str, message: str
) -> None:
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    ids = torch.arange(2, 7)[None]
    with pytest.raises(HookError, match=message):
        patching.grid(model, ids, ids, first_logit, hook)


def test_a_name_for_all_layers_is_its_shorthand(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    ids = torch.arange(2, 7)[None]
    by_name = patching.grid(model, ids, ids.flip(1), first_logit, "blocks.*.attn.hook_z", ("layer", "head"))
    expected = patching.grid(model, ids, ids.flip(1), first_logit, "z", ("layer", "head"))
    assert torch.equal(by_name.values, expected.values)


def test_something_else_than_a_metric_or_a_clean_side_is_an_error(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    ids = torch.arange(2, 7)[None]
    experiments: list[Callable[[Any, Any], object]] = [
        lambda clean, metric: patching.grid(model, ids, clean, metric),
        lambda clean, metric: patching.attribution(model, ids, clean, metric, hooks="z"),
        lambda clean, metric: patching.edge_scores(model, ids, clean, metric),
        lambda clean, metric: patching.path_patch(model, ids, clean, metric, "heads", "logits"),
    ]
    for experiment in experiments:
        with pytest.raises(PatchError, match="the metric is 'logit'; give a function of logits"):
            experiment(ids.flip(1), "logit")
        with pytest.raises(PatchError, match="the clean side is <function first_logit .*; give prompts"):
            experiment(first_logit, ids.flip(1))
    with pytest.raises(PatchError, match="the metric is 'logit'"):
        patching.ablate(model, ids, "logit")  # type: ignore[arg-type]
