"""Losses with an SAE are those of PyTorch's hooks on a plain model, and those of SAELens' own evaluation."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore import patching
from actstore.errors import HookError, PatchError
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (5, 9), generator=torch.Generator().manual_seed(4))
TOKENS[:, 0] = 0  # BOS
TOKENS[2, 4] = 1  # EOS
HOOK = "blocks.1.hook_resid_post"


class Autoencoder:
    """Rectified projections, with nothing of SAELens."""

    def __init__(self, d_in: int, hook: str | None) -> None:
        generator = torch.Generator().manual_seed(2)
        self.w_enc = torch.randn(d_in, 96, generator=generator) / d_in**0.5
        self.w_dec = torch.randn(96, d_in, generator=generator) / 96**0.5
        if hook is not None:
            self.cfg = SimpleNamespace(hook_name=hook)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.w_enc - 0.1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        value: Tensor = feature_acts @ self.w_dec
        return value


@pytest.fixture
def folder(tiny_model: TinyModel) -> Path:
    return tiny_model("llama")


@pytest.fixture
def model(folder: Path) -> HookedModel:
    return HookedModel.from_pretrained(folder, dtype="float32", device="cpu")


def by_hand(folder: Path, sae: Any, excluded: tuple[int, ...]) -> tuple[dict[str, float], float, int]:
    """Losses by what stands at the output of layer 1, and divergences; L0, and the number of losses."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    is_read = torch.ones_like(TOKENS, dtype=torch.bool)
    for number in excluded:
        is_read &= number != TOKENS
    with torch.no_grad():
        stream = plain(TOKENS, output_hidden_states=True).hidden_states[2]
        features = sae.encode(stream)
        spliced = torch.where(is_read[..., None], sae.decode(features), stream)
        new = {"model": stream, "sae": spliced, "zero": torch.zeros_like(stream)}
        new["mean"] = stream[is_read].mean(0).expand_as(stream)
        losses, predictions = {}, {}
        for name, value in new.items():
            handle = plain.model.layers[1].register_forward_hook(lambda _m, _a, _out, value=value: value)
            logits = plain(TOKENS).logits
            handle.remove()
            predictions[name] = logits.double().softmax(-1)
            each = torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), TOKENS[:, 1:], reduction="none"
            )
            losses[name] = float(each[is_read[:, :-1]].mean())
    for name in ("sae", "zero"):
        ratio = (predictions["model"] / predictions[name]).log()
        losses[f"kl {name}"] = float((predictions["model"] * ratio).sum(-1)[is_read].mean())
    return losses, float((features != 0).sum(-1)[is_read].double().mean()), int(is_read[:, :-1].sum())


@pytest.mark.parametrize("excluded", [(), (0, 1)])
def test_losses_are_those_of_a_plain_model(
    folder: Path, model: HookedModel, excluded: tuple[int, ...]
) -> None:
    named, unnamed = Autoencoder(64, HOOK), Autoencoder(64, None)
    losses, l0, n_tokens = by_hand(folder, named, excluded)
    results = [
        patching.loss_recovered(model, TOKENS, named, exclude=excluded),
        patching.loss_recovered(model, TOKENS, named, exclude=excluded, max_tokens=18),
        patching.loss_recovered(model, TOKENS, unnamed, ("resid_post", 1), exclude=excluded),
    ]
    for result in results:
        found = {"model": result.loss, "sae": result.loss_with_sae, "zero": result.loss_zero}
        found |= {"mean": result.loss_mean, "kl sae": result.kl_with_sae, "kl zero": result.kl_zero}
        assert found == pytest.approx(losses, abs=1e-5)
        assert result.l0 == pytest.approx(l0)
        assert (result.n_tokens, result.hook) == (n_tokens, HOOK)
        share = (losses["zero"] - losses["sae"]) / (losses["zero"] - losses["model"])
        assert result.recovered == pytest.approx(share, rel=1e-3)
        share = (losses["mean"] - losses["sae"]) / (losses["mean"] - losses["model"])
        assert result.recovered_from_mean == pytest.approx(share, rel=1e-3)
    assert not model.acts_to_saes
    assert not model.has_functions


def test_an_exact_sae_recovers_all(model: HookedModel) -> None:
    exact = SimpleNamespace(
        encode=lambda x: x, decode=lambda x: x, cfg=SimpleNamespace(hook_name="blocks.0.attn.hook_z")
    )
    result = patching.loss_recovered(model, TOKENS, exact)
    assert result.recovered == pytest.approx(1)
    assert result.loss_with_sae == pytest.approx(result.loss)
    nothing = SimpleNamespace(encode=lambda x: x, decode=torch.zeros_like, cfg=exact.cfg)
    assert patching.loss_recovered(model, TOKENS, nothing, exclude=()).recovered == pytest.approx(0, abs=1e-6)


def test_figures_are_those_of_sae_lens(model: HookedModel) -> None:
    """Its evaluation runs on our model, and leaves special tokens as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import StandardSAE, StandardSAEConfig
        from sae_lens.evals import EvalConfig, run_evals
        from sae_lens.training.activation_scaler import ActivationScaler

        sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128, apply_b_dec_to_input=False))
    sae.cfg.metadata.hook_name = HOOK
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)

    class Tokens:
        """What their evaluation asks of a store of activations."""

        store_batch_size_prompts = 5
        context_size = 9

        def get_batch_tokens(self, _n: int | None = None) -> Tensor:
            return TOKENS

        def reset_input_dataset(self) -> None:
            pass

    config = EvalConfig(
        batch_size_prompts=5,
        n_eval_reconstruction_batches=1,
        compute_ce_loss=True,
        compute_kl=True,
        n_eval_sparsity_variance_batches=1,
        compute_sparsity_metrics=True,
    )
    theirs, _ = run_evals(sae, Tokens(), model, ActivationScaler(), config)
    result = patching.loss_recovered(model, TOKENS, sae)
    figures = theirs["model_performance_preservation"]
    assert result.recovered == pytest.approx(figures["ce_loss_score"], abs=1e-4)
    assert result.loss == pytest.approx(figures["ce_loss_without_sae"], abs=1e-5)
    assert result.loss_with_sae == pytest.approx(figures["ce_loss_with_sae"], abs=1e-5)
    assert result.loss_zero == pytest.approx(figures["ce_loss_with_ablation"], abs=1e-5)
    figures = theirs["model_behavior_preservation"]
    assert result.kl_with_sae == pytest.approx(figures["kl_div_with_sae"], rel=1e-3)
    assert result.kl_zero == pytest.approx(figures["kl_div_with_ablation"], rel=1e-3)
    assert result.kl_recovered == pytest.approx(figures["kl_div_score"], abs=1e-3)
    assert result.l0 == pytest.approx(theirs["sparsity"]["l0"], rel=1e-4)


def test_what_does_not_fit_is_refused(model: HookedModel) -> None:
    with pytest.raises(HookError, match="does not say where it belongs"):
        patching.loss_recovered(model, TOKENS, Autoencoder(64, None))
    with pytest.raises(HookError, match="encode and decode"):
        patching.loss_recovered(model, TOKENS, SimpleNamespace(cfg=None), HOOK)
    with pytest.raises(HookError, match="encode and decode, found None"):
        patching.loss_recovered(model, TOKENS, None, HOOK)  # type: ignore[arg-type]
    narrow = Autoencoder(16, HOOK)
    narrow.cfg.d_in = 16
    for hook in (None, HOOK):
        with pytest.raises(HookError, match="the SAE reads 16 numbers, and .* has 64"):
            patching.loss_recovered(model, TOKENS, narrow, hook)
    with pytest.raises(PatchError, match="no token has a loss"):
        patching.loss_recovered(model, TOKENS[:, :1], Autoencoder(64, HOOK))
    with pytest.raises(PatchError, match="no token has a loss"):
        patching.loss_recovered(model, TOKENS[:, :2], Autoencoder(64, HOOK), exclude=[0])
