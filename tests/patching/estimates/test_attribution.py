"""Estimates are steps times gradients of the plain model, or times coefficients of forwards that are written out."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore import patching
from actstore.errors import HookError, ModelError, PatchError
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.names import join
from actstore.patching.axes import leaf_of
from actstore.patching.estimates.relevance_rules import RULES, ratio_of, relevance_rules
from tests.patching.estimates.plain_models import Plain, gpt2, llama

TinyModel = Callable[..., Path]
CORRUPTED = torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(1))
CLEAN = CORRUPTED.clone()
CLEAN[0, 2], CLEAN[1, 4], CLEAN[:, 5] = 7, 9, 11
HOOKS = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "post", "pre")
FAMILIES = (
    "gpt2",
    "gpt_neo",
    "gptj",
    "gpt_neox",
    "llama",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "opt",
    "qwen3",
)


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 6]


def load(folder: Path) -> HookedModel:
    return HookedModel.from_pretrained(folder, dtype="float32", device="cpu")


def test_attribution_patching_is_autograd_on_the_plain_model(tiny_model: TinyModel) -> None:
    """Nothing of ours on the other side: PyTorch's hooks and gradients on a Hugging Face model."""
    folder = tiny_model("llama")
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    seen: dict[str, Tensor] = {}

    def before(name: str) -> Any:
        def keep(_module: Any, args: Any, kwargs: Any) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            if value.requires_grad:
                value.retain_grad()
            seen[name] = value

        return keep

    def after(name: str) -> Any:
        def keep(_module: Any, _args: Any, out: Any) -> None:
            value = out[0] if isinstance(out, tuple) else out
            value.retain_grad()
            seen[name] = value

        return keep

    for number, layer in enumerate(plain.model.layers):
        layer.register_forward_pre_hook(before(join(number, "hook_resid_pre")), with_kwargs=True)
        layer.self_attn.o_proj.register_forward_pre_hook(
            before(join(number, "attn.hook_z")), with_kwargs=True
        )
        layer.self_attn.q_proj.register_forward_hook(after(join(number, "attn.hook_q")))
        layer.self_attn.k_proj.register_forward_hook(after(join(number, "attn.hook_k")))
        layer.mlp.register_forward_hook(after(join(number, "hook_mlp_out")))
        layer.mlp.down_proj.register_forward_pre_hook(before(join(number, "mlp.hook_post")), with_kwargs=True)
    plain(CLEAN)
    clean = {name: value.detach() for name, value in seen.items()}
    numbers = difference(plain(CORRUPTED).logits)
    torch.autograd.backward(numbers.sum())

    def products(name: str) -> Tensor:
        gradient = seen[name].grad
        assert gradient is not None
        return (clean[name] - seen[name].detach()) * gradient

    model = load(folder)
    hooks = {"resid_pre": None, "mlp_out": None, "z": 4, "q": 4, "k": 2, "post": 128}
    results = patching.attribution(model, CORRUPTED, CLEAN, difference, hooks=list(hooks), positions=-1)
    assert [*results] == [*hooks]
    for hook, split in hooks.items():
        expected = torch.stack([products(join(number, leaf_of(model.names, hook))) for number in range(3)], 1)
        expected = expected.view(2, 3, 7, split or 1, -1).sum(-1).view_as(results[hook].values)
        result = results[hook]
        torch.testing.assert_close(result.difference.double(), expected, atol=2e-6, rtol=0, msg=hook)
        torch.testing.assert_close(result.corrupted.double(), numbers.detach(), atol=1e-5, rtol=0)
        assert [axis.name for axis in result.axes][:3] == ["prompt", "layer", "pos"]
        assert not result.is_exact.any()
        assert result.difference.abs().max() > 1e-3
    of_heads = patching.attribution(
        model, CORRUPTED, CLEAN, lambda logits: difference(logits).mean(), hooks="z", axes=("layer", "head")
    )
    torch.testing.assert_close(of_heads.difference, results["z"].difference.sum(2).mean(0), atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_coefficients_are_those_of_forwards_that_are_written_out(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    model = load(folder)
    results = {
        method: patching.attribution(model, CORRUPTED, CLEAN, difference, method=method, hooks=HOOKS)
        for method in ("atp", "relp")
    }
    for by_rules in (False, True):
        for row in range(2):
            runs = []
            for tokens in (CLEAN[row], CORRUPTED[row]):
                run = Plain(plain.state_dict(), by_rules=by_rules)
                logits = (
                    gpt2(run, tokens) if family == "gpt2" else llama(run, tokens, gemma2=family == "gemma2")
                )
                # Their norms and angles are float32 whatever the model is.
                torch.testing.assert_close(logits, plain(tokens[None]).logits[0], atol=2e-6, rtol=0)
                runs.append(run)
            (number,) = difference(logits[None])
            values = runs[1].seen
            gradients = torch.autograd.grad(number, [*values.values()])
            expected = {
                name: (runs[0].seen[name] - value) * gradient
                for (name, value), gradient in zip(values.items(), gradients, strict=True)
            }
            for hook, result in results["relp" if by_rules else "atp"].items():
                products = torch.stack(
                    [expected[join(layer, leaf_of(model.names, hook))] for layer in range(3)]
                )
                products = products if hook in ("pre", "post") else products.sum(-1)
                products = products.detach()
                scale = float(products.abs().max())
                assert scale > 1e-4
                torch.testing.assert_close(
                    result.difference[row].double(),
                    products.detach(),
                    atol=2e-6 + 1e-5 * scale,
                    rtol=0,
                    msg=hook,
                )
    for hook, result in results["relp"].items():
        assert not torch.allclose(result.values, results["atp"][hook].values, atol=1e-4), hook


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_change_no_value(tiny_model: TinyModel, family: str) -> None:
    model = load(tiny_model(family))
    with model.hooks(relevance_rules(model, {})):
        logits = model(CORRUPTED, grad=True)
        torch.testing.assert_close(logits.detach(), model(CORRUPTED), atol=2e-5, rtol=0)
    relp = patching.attribution(model, CORRUPTED, CLEAN, difference, method="relp", hooks="mlp_out")
    atp = patching.attribution(model, CORRUPTED, CLEAN, difference, hooks="mlp_out")
    assert not torch.allclose(relp.values, atp.values, atol=1e-4)


def test_the_ratio_of_an_activation_function_at_zero_is_its_slope() -> None:
    for name, slope in (("gelu", 0.5), ("silu", 0.5), ("relu", 0.0)):
        function = getattr(torch.nn.functional, name)
        pre = torch.tensor([-3.0, -1e-3, -1e-41, 0.0, 1e-41, 1e-36, 1e-3, 3.0])
        value, ratio = ratio_of(function, pre)
        assert torch.equal(value, function(pre))
        assert ratio[3] == slope, name
        torch.testing.assert_close(ratio[[0, 1, 6, 7]], (value / pre)[[0, 1, 6, 7]])
        expected = (function(pre.double()) / pre.double())[5]
        torch.testing.assert_close(ratio[5].double(), expected)


def test_refined_cells_are_those_of_the_grid(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"))

    def metric(logits: Tensor) -> Tensor:
        """Most cells lower it."""
        return -difference(logits)

    exact = patching.grid(model, CORRUPTED[:1], CLEAN[:1], metric, "z", ("layer", "pos", "head"))
    _, new = model.run_with_cache(CLEAN[:1])
    _, old = model.run_with_cache(CORRUPTED[:1])
    differs = torch.stack([(new["z", layer] != old["z", layer]).any(-1)[0] for layer in range(3)])
    candidates = differs.flatten().nonzero()[:, 0]
    masks = []
    for seed in range(4):
        result = patching.attribution(
            model,
            CORRUPTED[:1],
            CLEAN[:1],
            metric,
            hooks="z",
            refine=9,
            sample=30,
            seed=seed,
            positions=-1,
        )
        masks.append(result.is_exact)
        torch.testing.assert_close(
            result.values[result.is_exact], exact.values[result.is_exact], atol=1e-5, rtol=0
        )
        assert torch.equal(result.values[~result.is_exact], result.estimate[~result.is_exact])
        largest = (result.estimate - result.corrupted).abs().flatten().topk(9).indices
        assert result.is_exact.flatten()[largest].all()
        # The draw is the one that torch makes with this seed, of the cells that differ.
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
        drawn = candidates[order[:30]]
        assert int(result.is_exact.sum()) == len({*drawn.tolist(), *largest.tolist()})
        estimates = (result.estimate - result.corrupted).flatten()[drawn]
        pair = torch.stack([estimates, exact.difference.flatten()[drawn]])
        assert result.correlation == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-4)
        top = [set(row.abs().topk(3).indices.tolist()) for row in pair]
        assert result.recall == pytest.approx(len(top[0] & top[1]) / 3)
        assert result.n_sampled == 30
    assert not torch.equal(masks[0], masks[1])


def test_every_cell_refined_is_the_grid(tiny_model: TinyModel) -> None:
    """Also for single neurons, and for scores, which have no difference where they are hidden; from a cache."""
    model = load(tiny_model("gemma2"))
    _, cache = model.run_with_cache(CLEAN)
    for hook, axes in (
        ("attn_scores", ("layer", "head", "dest_pos", "src_pos")),
        ("pattern", ("layer", "head", "dest_pos")),
        ("k", ("layer", "pos", "head")),
        ("post", ("layer", "neuron")),
        ("ln1.hook_scale", ("layer", "pos")),
    ):
        exact = patching.grid(model, CORRUPTED, cache, difference, hook, axes, engine="whole rows")
        all_cells = exact.values[0].numel()
        result = patching.attribution(
            model, CORRUPTED, cache, difference, hooks=hook, axes=axes, refine=all_cells
        )
        torch.testing.assert_close(result.values, exact.values, atol=1e-5, rtol=0, msg=hook)
        assert result.is_exact.all()
        assert result.clean is not None
        torch.testing.assert_close(result.clean, difference(model(CLEAN)), atol=1e-5, rtol=0, msg=hook)
        assert result.estimate.isfinite().all()
        error = (result.estimate - result.values).norm() / result.difference.norm()
        assert 0 < float(error) < 1, hook


def test_estimates_of_small_steps_are_exact(tiny_model: TinyModel) -> None:
    """To first order: with a step a hundred times smaller, the error is far smaller than the step."""
    model = load(tiny_model("gpt_neox"))
    _, there = model.run_with_cache(CLEAN, names_filter="blocks.*.hook_resid_pre")
    _, here = model.run_with_cache(CORRUPTED, names_filter="blocks.*.hook_resid_pre")
    near = {name: here[name] + (there[name] - here[name]) / 100 for name in here}
    exact = patching.grid(model, CORRUPTED, near, difference)
    result = patching.attribution(model, CORRUPTED, near, difference, hooks="resid_pre")
    assert (result.difference - exact.difference).norm() < 0.02 * exact.difference.norm()


def test_results_are_saved_shown_and_listed(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = load(tiny_model("gpt2"))
    results = patching.attribution(
        model, CORRUPTED[:1], CLEAN[:1], difference, hooks=("post", "z"), refine=3, sample=4
    )
    for hook, result in results.items():
        path = tmp_path / f"{hook}.parquet"
        result.save(path)
        again = patching.Estimate.load(path)
        for name, value in vars(result).items():
            other = getattr(again, name)
            assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, name
        with pytest.raises(
            PatchError, match=r"another kind of result; read it with patching\.Estimate\.load"
        ):
            patching.PatchResult.load(path)
        result.save(tmp_path / "page.html")
        assert (tmp_path / "page.html").stat().st_size < 1e6
        (labels, largest), second = result.top(2)
        assert abs(largest) >= abs(second[1])
        assert largest == pytest.approx(float(result.difference.flatten()[result.difference.abs().argmax()]))
        assert len(labels) == 3
        indices = [axis.labels.index(label) for axis, label in zip(result.axes, labels, strict=True)]
        assert float(result.difference[tuple(indices)]) == largest
    assert "recall" in repr(results["z"])
    assert repr(results["z"]).startswith("<Estimate (atp) z of")
    grid = patching.grid(model, CORRUPTED, CLEAN, difference)
    grid.save(tmp_path / "grid.parquet")
    with pytest.raises(PatchError, match=r"read it with patching\.PatchResult\.load"):
        patching.Estimate.load(tmp_path / "grid.parquet")


def test_what_cannot_be_estimated_is_refused(tiny_model: TinyModel) -> None:
    model = load(tiny_model("gemma2"))
    mixture = load(tiny_model("mixtral"))

    def estimate(model: HookedModel = model, metric: Any = difference, **options: Any) -> Any:
        return patching.attribution(model, CORRUPTED, CLEAN, metric, **options)

    refused: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            ModelError,
            r"RelP has no rule for layer 0, whose MLP is a mixture of experts; use method='atp'",
            lambda: estimate(mixture, method="relp"),
        ),
        (HookError, "RelP holds .* so q has no coefficient", lambda: estimate(method="relp", hooks="q")),
        (HookError, "no coefficient of result where a norm", lambda: estimate(method="relp", hooks="result")),
        (PatchError, "method is 'lrp'; choose", lambda: estimate(method="lrp")),
        (
            PatchError,
            "the metric gave a tensor without a gradient",
            lambda: estimate(metric=lambda x: difference(x).detach()),
        ),
        (PatchError, "the metric gave float", lambda: estimate(metric=lambda x: difference(x).sum().item())),
        (PatchError, "the metric gave shape", lambda: estimate(metric=lambda x: x[..., 0])),
        (PatchError, r"axes is \['layer', 'neuron'\]", lambda: estimate(hooks="z", axes=("layer", "neuron"))),
        (PatchError, "refine is -1", lambda: estimate(refine=-1)),
        (
            HookError,
            "can be read but not changed; patch the input or the output of the MLP",
            lambda: estimate(mixture, hooks="mlp.hook_expert_weights"),
        ),
    ]
    for kind, message, call in refused:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with (
        model.hooks([(("mlp_out", 0), lambda value, hook: value * 2)]),
        pytest.raises(ModelError, match="the rules of RelP know nothing of"),
    ):
        estimate(method="relp")
    assert estimate(mixture, hooks="z").difference.abs().max() > 1e-3
    assert {"layer norm", "rms norm", "rms_plus_one norm"} < RULES.keys()
    assert math.isfinite(float(estimate(method="relp", hooks="z").values.sum()))


def test_another_activation_function_than_that_of_the_configuration_is_refused(tiny_model: TinyModel) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    plain.model.layers[1].mlp.act_fn = torch.nn.GELU().eval()
    model = HookedModel(plain, check=False)
    with pytest.raises(ModelError, match=r"blocks\.1\.mlp\.hook_post is not what the activation function"):
        patching.attribution(model, CORRUPTED, CLEAN, difference, method="relp")
