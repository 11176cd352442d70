"""Ablation gives what PyTorch's hooks on a plain Hugging Face model give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import actstore
from actstore import patching
from actstore.errors import HookError, PatchError
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(4))
OTHERS = torch.randint(2, 300, (5, 7), generator=torch.Generator().manual_seed(5))
N_LAYERS, N_HEADS, D_HEAD = 3, 4, 16


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 6]


class Plain:
    """A Llama of Hugging Face, whose z is the input of its output projections."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.projections = [layer.self_attn.o_proj for layer in self.model.base_model.layers]

    def z(self, tokens: Tensor) -> list[Tensor]:
        """Values of all layers [prompt, position, head, d_head]."""
        kept: list[Tensor] = []
        handles = [
            projection.register_forward_pre_hook(lambda _m, args: kept.append(args[0].clone()))
            for projection in self.projections
        ]
        with torch.no_grad():
            self.model(tokens)
        for handle in handles:
            handle.remove()
        return [value.view(*value.shape[:2], N_HEADS, D_HEAD) for value in kept]

    def without(self, heads: list[tuple[int, int]], new: Callable[[int], Tensor]) -> Tensor:
        """The metric with new values [prompt, position, head, d_head], or of fewer axes, in the place of z of heads."""

        def edit(layer: int, its_heads: list[int]) -> Any:
            def before(_module: Any, args: Any) -> Any:
                value = args[0].clone().view(*args[0].shape[:2], N_HEADS, D_HEAD)
                value[:, :, its_heads] = new(layer).expand(value.shape)[:, :, its_heads]
                return (value.flatten(2),)

            return before

        layers = {layer for layer, _ in heads}
        handles = [
            self.projections[layer].register_forward_pre_hook(
                edit(layer, [head for its_layer, head in heads if its_layer == layer])
            )
            for layer in layers
        ]
        with torch.no_grad():
            value = difference(self.model(TOKENS).logits)
        for handle in handles:
            handle.remove()
        return value

    def grid(self, new: Callable[[int], Tensor]) -> Tensor:
        rows = [[self.without([(layer, head)], new) for head in range(N_HEADS)] for layer in range(N_LAYERS)]
        return torch.stack([torch.stack(row) for row in rows]).movedim(-1, 0)


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedModel:
    return HookedModel.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


def test_heads_are_ablated_as_by_hand(model: HookedModel, plain: Plain) -> None:
    """By zeros, by means over prompts and positions or over prompts alone, and by values of another prompt."""
    others = plain.z(OTHERS)
    _, cache = model.run_with_cache(OTHERS)
    _, one = model.run_with_cache(OTHERS[3:4])
    zeros, own, swapped = torch.zeros(D_HEAD), plain.z(TOKENS), plain.z(TOKENS.flip(0))
    cases: list[tuple[dict[str, Any], Callable[[int], Tensor]]] = [
        ({"value": "zero"}, lambda layer: zeros),
        ({"value": "mean", "source": OTHERS}, lambda layer: others[layer].mean((0, 1))),
        ({"value": "mean", "source": cache}, lambda layer: others[layer].mean((0, 1))),
        ({"value": "mean", "source": OTHERS, "by_position": True}, lambda layer: others[layer].mean(0)),
        ({"value": "mean", "source": cache, "by_position": True}, lambda layer: others[layer].mean(0)),
        ({"value": "mean"}, lambda layer: own[layer].mean((0, 1))),
        ({"value": "resample", "source": one}, lambda layer: others[layer][3]),
        # Of two prompts, each can only take the values of the other.
        ({"value": "resample"}, lambda layer: swapped[layer]),
    ]
    for arguments, new in cases:
        expected = plain.grid(new)
        for engine in ("packed rows", "whole rows"):
            result = patching.ablate(model, TOKENS, difference, **arguments, positions=-1, engine=engine)
            torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=0, msg=str(arguments))
        with torch.no_grad():
            torch.testing.assert_close(
                result.corrupted, difference(plain.model(TOKENS).logits), atol=1e-5, rtol=0
            )
        assert result.difference.abs().min() > 1e-6
        assert result.clean is None


def test_sets_are_ablated_together(model: HookedModel, plain: Plain) -> None:
    sets = [[(0, 1)], [(0, 1), (2, 3)], [(0, 0), (0, 1), (1, 2), (2, 3)]]
    means = plain.z(OTHERS)
    expected = [plain.without(its, lambda layer: means[layer].mean((0, 1))) for its in sets]
    for engine in ("packed rows", "whole rows"):
        result = patching.ablate(
            model, TOKENS, difference, value="mean", source=OTHERS, together=sets, positions=-1, engine=engine
        )
        torch.testing.assert_close(result.values.T, torch.stack(expected), atol=1e-5, rtol=0)
        assert result.axes[1].labels == ("0.1", "0.1, 2.3", "0.0, 0.1, 1.2, 2.3")
    alone = patching.ablate(model, TOKENS, difference, "mlp_out", ("layer",))
    layers = patching.ablate(model, TOKENS, difference, "mlp_out", together=[[0], [1], [2], [0, 2]])
    torch.testing.assert_close(layers.values[:, :3], alone.values, atol=1e-5, rtol=0)


def test_every_kind_of_hook_is_ablated_by_both_engines(model: HookedModel) -> None:
    cases: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("resid_pre", ("layer", "pos"), {}),
        ("mlp_out", ("layer", "pos"), {"value": "mean", "source": OTHERS}),
        ("k", ("layer", "head"), {"value": "resample", "source": OTHERS}),
        ("pattern", ("layer", "head"), {}),
        ("pattern", ("layer", "head"), {"value": "mean", "source": OTHERS, "by_position": True}),
        ("attn_scores", ("layer", "head"), {"value": "resample", "source": OTHERS}),
    ]
    for hook, axes, arguments in cases:
        fast, slow = (
            patching.ablate(model, TOKENS, difference, hook, axes, **arguments, engine=engine)
            for engine in ("packed rows", "whole rows")
        )
        torch.testing.assert_close(fast.values, slow.values, atol=1e-5, rtol=0, msg=hook)
        assert fast.difference.abs().max() > 1e-5


def test_means_and_sequences_of_a_store(model: HookedModel, plain: Plain, fields: dict[str, Any]) -> None:
    job = actstore.plan(**fields | {"hooks": ["blocks.*.attn.hook_z"], "dtype": "float32"})
    actstore.extract(job)
    store = actstore.open(fields["out"])
    stored = [np.asarray(store[f"blocks.{layer}.attn.hook_z"][:]) for layer in range(N_LAYERS)]
    means = [torch.from_numpy(values.reshape(-1, N_HEADS, D_HEAD).mean(0)) for values in stored]
    result = patching.ablate(model, TOKENS, difference, value="mean", source=store, positions=-1)
    torch.testing.assert_close(result.values, plain.grid(means.__getitem__), atol=1e-5, rtol=0)
    sequence = [torch.from_numpy(values[11, :7]) for values in stored]
    result = patching.ablate(
        model, TOKENS, difference, value="resample", source=store.cache([11]), positions=-1
    )
    torch.testing.assert_close(result.values, plain.grid(sequence.__getitem__), atol=1e-5, rtol=0)
    with pytest.raises(HookError, match="hook_mlp_out"):
        patching.ablate(model, TOKENS, difference, "mlp_out", ("layer",), "mean", source=store)
    with pytest.raises(PatchError, match=r"store\.cache"):
        patching.ablate(model, TOKENS, difference, value="resample", source=store)


def test_means_of_a_cache_are_those_of_its_positions(model: HookedModel, plain: Plain) -> None:
    """With an axis of prompts, without one, as means already, and as arrays: each layer by itself."""
    _, cache = model.run_with_cache(OTHERS[:1], names_filter="blocks.*.attn.hook_z")
    z = plain.z(OTHERS[:1])
    first, second, third = cache.keys()
    source = {first: cache[first], second: cache[second][0], third: cache[third].mean((0, 1)).numpy()}
    result = patching.ablate(model, TOKENS, difference, value="mean", source=source)
    for layer in range(N_LAYERS):
        expected = plain.without([(layer, 2)], lambda layer: z[layer].mean((0, 1)))
        torch.testing.assert_close(result.values[:, layer, 2], expected, atol=1e-5, rtol=0)


def test_drawing_depends_on_the_seed_alone(model: HookedModel) -> None:
    def values(seed: int) -> Tensor:
        return patching.ablate(
            model, OTHERS, difference, value="resample", seed=seed, positions=-1, together=[[(0, 1)]]
        ).values

    assert torch.equal(values(0), values(0))
    assert not torch.equal(values(0), values(1))
    # None keeps its own values: its metric changes.
    for seed in range(5):
        kept = values(seed)[:, 0] - difference(model(OTHERS))
        assert (kept.abs() > 1e-6).all()


def test_what_does_not_fit_is_refused(model: HookedModel) -> None:
    _, cache = model.run_with_cache(OTHERS[:, :5], names_filter="blocks.*.attn.hook_z")
    other = {f"blocks.{layer}.attn.hook_z": torch.zeros(2, 7, 4, 8) for layer in range(3)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"value": "median"}, "value is 'median'"),
        ({"hook": "attn_scores"}, "let positions see later ones"),
        ({"hook": "pattern", "value": "mean"}, "give by_position=True"),
        ({"source": cache}, "zeros need no source"),
        ({"value": "resample", "source": cache}, r"shape \[5, 5, 4, 16\], and the prompts have 7 positions"),
        (
            {"value": "mean", "source": cache, "by_position": True},
            "are of 5 positions, and the prompts have 7",
        ),
        (
            {"value": "mean", "source": other},
            r"mean of blocks\.0\.attn\.hook_z has shape \[4, 8\], .* has \[4, 16\]",
        ),
        (
            {"value": "resample", "source": other},
            r"shape \[2, 7, 4, 8\], and those of this model have \[4, 16\]",
        ),
        ({"value": "mean", "source": ["a b", "a"], "by_position": True}, "need prompts of one length"),
        ({"together": [[(0, 4)]]}, r"holds \(0, 4\); there are layers 0 to 2, and heads 0 to 3"),
        ({"together": [[]]}, "together is empty"),
        ({"together": [["z"]]}, r"give \(layer, head\)"),
        ({"together": [3]}, r"holds 3; give lists of \(layer, head\)"),
        *(
            ({"value": value, "source": {name: torch.zeros(*shape, 4, 1) for name in cache}}, says)
            for value, shape, says in (
                ("mean", (), r"mean of .* has shape \[4, 1\], .* has \[4, 16\]"),
                ("mean", (5, 7), r"mean of .* has shape \[4, 1\], .* has \[4, 16\]"),
                ("resample", (5, 7), r"shape \[5, 7, 4, 1\], and those of this model have \[4, 16\]"),
            )
        ),
    ]
    for arguments, text in cases:
        with pytest.raises(PatchError, match=text):
            patching.ablate(model, TOKENS, difference, **arguments)
    with pytest.raises(PatchError, match="there is one prompt"):
        patching.ablate(model, TOKENS[:1], difference, value="resample")


def test_names_are_moved_by_the_heads_that_patching_finds(smollm2: Path) -> None:
    """Indirect objects: without the heads that say the name, ranked by patching their outputs, it is not said."""
    model = HookedModel.from_pretrained(smollm2, dtype="float32", device="cpu")
    clean = "When John and Mary went to the shops, John gave the bag to"
    corrupted = "When John and Mary went to the shops, Mary gave the bag to"
    mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")

    def named(logits: Tensor) -> Tensor:
        return (logits[:, -1, mary] - logits[:, -1, john]).mean()

    tokens, clean_tokens = model.to_tokens(corrupted), model.to_tokens(clean)
    result = patching.grid(model, tokens, clean_tokens, named, "z", ("layer", "head"), positions=-1)
    best = result.effect.flatten().topk(5).indices.tolist()
    heads = [(number // 9, number % 9) for number in best]
    others = [(layer, (head + 4) % 9) for layer, head in heads]
    both = torch.cat([tokens, clean_tokens])
    for arguments in ({"value": "zero"}, {"value": "mean", "source": both, "by_position": True}):
        ablated = patching.ablate(
            model, clean_tokens, named, **arguments, together=[heads[:1], heads, others], positions=-1
        )
        one, all_of_them, rest = (ablated.values / ablated.corrupted).tolist()
        assert all_of_them < one < 1
        assert all_of_them < 0.6
        assert rest > all_of_them + 0.2
