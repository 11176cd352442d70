"""A hooked model in SAELens' own programs, and SAEs in the forward of a hooked model."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from actstore.demo import MODEL_PATH
from actstore.errors import HookError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from tests.integrations.saes import D_IN, HEADS, MLP, RESID
from tests.parity.bridge import boot

D_SAE = 96


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel.from_pretrained(MODEL_PATH, device="cpu")


@pytest.fixture(scope="module")
def bridge() -> Any:
    booted = boot(MODEL_PATH)
    booted.__class__ = SAETransformerBridge  # as SAELens does it
    booted._acts_to_saes, booted._transcoder_output_hooks = {}, {}
    return booted


@pytest.fixture(autouse=True)
def _leaves_nothing(model: HookedModel) -> Iterator[None]:
    yield
    assert not model.acts_to_saes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


def sae_at(hook: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    cfg = StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, metadata=SAEMetadata(hook_name=hook), **options)
    return filled(StandardSAE(cfg))


def filled(sae: Any) -> Any:
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return sae.eval()


@pytest.fixture(scope="module")
def tokens(model: HookedModel) -> Tensor:
    return model.to_tokens("My lord, I came to see your father's funeral")


# SAEs in the forward


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("hook", [RESID, MLP, "blocks.3.hook_resid_pre"])
def test_values_are_those_of_saelens(
    model: HookedModel, bridge: Any, tokens: Tensor, hook: str, error_term: bool
) -> None:
    sae = sae_at(hook)
    theirs = bridge.run_with_saes(tokens, saes=[sae], use_error_term=error_term)
    ours, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=error_term)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    plain = model(tokens)
    assert torch.allclose(ours, plain, atol=1e-4) == error_term
    assert torch.equal(model.run_with_saes(tokens, saes=sae, use_error_term=error_term), ours)
    features = cache[f"{hook}.hook_sae_acts_post"]
    assert torch.equal(features, sae.encode(cache[f"{hook}.hook_sae_input"]))
    assert torch.equal(cache[f"{hook}.hook_sae_acts_pre"].relu(), features)
    assert torch.equal(cache[f"{hook}.hook_sae_recons"], sae.decode(features))
    assert torch.equal(cache[f"{hook}.hook_sae_output"], cache[hook])
    assert (f"{hook}.hook_sae_error" in cache) == error_term
    assert "hook_sae_acts_post" in repr(cache)


@pytest.mark.parametrize("error_term", [False, True])
def test_a_feature_is_set_to_zero(model: HookedModel, bridge: Any, tokens: Tensor, error_term: bool) -> None:
    sae, name = sae_at(RESID), f"{RESID}.hook_sae_acts_post"

    def without(features: Tensor, hook: HookPoint) -> Tensor:
        features[..., :40] = 0
        return features

    ours = model.run_with_hooks_with_saes(
        tokens, saes=[sae], use_error_term=error_term, fwd_hooks=[(name, without)]
    )
    with bridge.saes([sae], use_error_term=error_term):
        theirs = bridge.run_with_hooks(tokens, fwd_hooks=[(bridge.get_sae_hook_name(sae), without)])
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(ours, model.run_with_saes(tokens, saes=[sae]), atol=1e-3)


def test_values_of_heads(model: HookedModel, tokens: Tensor) -> None:
    """Whether or not the SAE puts heads side by side itself."""
    flattening, plain = sae_at(HEADS, reshape_activations="hook_z"), sae_at(HEADS)
    plain.load_state_dict(flattening.state_dict())
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[flattening])
    assert torch.equal(model.run_with_saes(tokens, saes=[plain]), logits)
    z = model.run_with_cache(tokens)[1][HEADS]
    assert torch.equal(cache[HEADS].flatten(-2), plain.decode(plain.encode(z.flatten(-2))))


def test_a_transcoder_reads_one_hook_and_writes_another(
    model: HookedModel, bridge: Any, tokens: Tensor
) -> None:
    reads, writes = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    metadata = SAEMetadata(hook_name=reads, hook_name_out=writes)
    transcoder = filled(
        Transcoder(
            TranscoderConfig(
                d_in=D_IN, d_out=D_IN, d_sae=D_SAE, metadata=metadata, apply_b_dec_to_input=False
            )
        )
    )
    given = model.run_with_cache(tokens)[1][reads]
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[transcoder])
    assert torch.equal(cache[writes], transcoder.decode(transcoder.encode(given)))
    assert torch.equal(cache[reads], given)
    assert f"{writes}.hook_sae_acts_post" in cache
    same = model.run_with_saes(tokens, saes=[transcoder], use_error_term=True)
    torch.testing.assert_close(same, model(tokens), atol=1e-3, rtol=1e-4)
    assert not torch.allclose(logits, same, atol=1e-2)


def test_any_object_that_encodes_and_decodes(model: HookedModel, tokens: Tensor) -> None:
    class Halves:
        cfg = SimpleNamespace(hook_name=("resid_post", 1))

        def encode(self, x: Tensor) -> Tensor:
            return torch.cat([x.relu(), (-x).relu()], -1)

        def decode(self, feature_acts: Tensor) -> Tensor:
            positive, negative = feature_acts.chunk(2, -1)
            return (positive - negative) / 2

    logits, cache = model.run_with_cache_with_saes(tokens, saes=[Halves()])
    expected = model.run_with_hooks(tokens, fwd_hooks=[(("resid_post", 1), lambda value, hook: value / 2)])
    assert torch.equal(logits, expected)
    assert cache["blocks.1.hook_resid_post.hook_sae_acts_post"].shape == (*tokens.shape, 2 * D_IN)


def test_gradients_of_features(model: HookedModel, tokens: Tensor) -> None:
    sae, name = sae_at(RESID), f"{RESID}.hook_sae_acts_post"
    logits, cache = model.run_with_cache_with_saes(
        tokens, saes=[sae], names_filter=[name, "hook_embed"], grad=True, use_error_term=True
    )
    gradient = cache.gradients(logits[0, -1, 7])[name]
    step = torch.randn(D_SAE, generator=torch.Generator().manual_seed(3)) * 1e-2

    def moved(sign: int) -> Any:
        return lambda value, hook: value + sign * step

    up, down = (
        model.run_with_hooks_with_saes(
            tokens, saes=[sae], fwd_hooks=[(name, moved(sign))], use_error_term=True
        )
        for sign in (1, -1)
    )
    torch.testing.assert_close(((up - down) / 2)[0, -1, 7], (gradient * step).sum(), atol=1e-3, rtol=1e-2)


def test_functions_for_gradients_of_an_sae_and_of_its_hook(model: HookedModel, tokens: Tensor) -> None:
    """What a function on features gives back is what the hook sees, and goes further back from there."""
    sae, name = sae_at(RESID), f"{RESID}.hook_sae_acts_post"
    earlier = "blocks.0.hook_resid_post"
    seen: dict[str, Tensor] = {}

    def see(gradient: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = gradient.clone()

    def run(factor: float, *more: Any) -> dict[str, Tensor]:
        seen.clear()
        hooks: list[Any] = [(name, lambda gradient, hook: factor * gradient), *more]
        with model.hooks(bwd_hooks=[*hooks, ([earlier, RESID, name], see)]):
            model(tokens, "loss").backward()
        return dict(seen)

    logits, cache = model.run_with_cache_with_saes(
        tokens, "loss", saes=[sae], names_filter=[earlier, RESID, name], grad=True
    )
    gradients = cache.gradients(logits)
    with model.saes(sae):
        plain, tripled = run(1.0), run(3.0)
        into = f"{RESID}.hook_sae_input"
        zeroed = run(1.0, (into, lambda gradient, hook: torch.zeros_like(gradient)))
    assert plain.keys() == {earlier, RESID, name}
    torch.testing.assert_close(plain[name], gradients[name])
    torch.testing.assert_close(plain[earlier], gradients[earlier])
    assert plain[earlier].any()
    torch.testing.assert_close(tripled[name], plain[name])
    for before in (RESID, earlier):
        torch.testing.assert_close(tripled[before], 3 * plain[before])
        assert not zeroed[before].any()


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_texts_are_generated_with_an_sae(model: HookedModel, tokens: Tensor, use_past_kv_cache: bool) -> None:
    sae, name = sae_at(RESID), f"{RESID}.hook_sae_acts_post"
    expected = tokens
    with model.saes(sae):
        for _ in range(4):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
        generated, cache = model.generate(
            tokens,
            max_new_tokens=4,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=use_past_kv_cache,
            names_filter=[name, RESID],
        )
        _, whole = model.run_with_cache(expected, names_filter=[name, RESID])
    assert torch.equal(generated, expected)
    assert list(cache) == list(whole)
    for kept in whole:
        torch.testing.assert_close(cache[kept], whole[kept], atol=1e-4, rtol=1e-4)


def test_a_forward_that_starts_at_a_layer_has_the_saes_behind_it(model: HookedModel, tokens: Tensor) -> None:
    early, late = sae_at("blocks.0.hook_resid_post"), sae_at(RESID)
    name = f"{RESID}.hook_sae_acts_post"
    with model.saes([early, late]):
        logits, whole = model.run_with_cache(tokens)
        early.encode = None  # would fail
        rest, cache = model.run_with_cache(whole["resid_pre", 1], start_at_layer=1)
        calls: list[int] = []
        handle = model.layers[3].register_forward_hook(lambda *_: calls.append(1))
        nothing, few = model.run_with_cache(whole["resid_pre", 1], None, start_at_layer=1, names_filter=name)
        handle.remove()
    torch.testing.assert_close(rest, logits)
    assert "blocks.0.hook_resid_post.hook_sae_acts_post" in whole
    assert "blocks.0.hook_resid_post.hook_sae_acts_post" not in cache
    torch.testing.assert_close(cache[name], whole[name])
    assert nothing is None
    assert list(few) == [name]
    assert not calls


def test_saes_come_and_go(model: HookedModel, tokens: Tensor) -> None:
    first, second, other = sae_at(RESID), sae_at(RESID, seed=1), sae_at(MLP)
    plain = model(tokens)
    model.add_sae(first)
    model.add_sae(other)
    both = model(tokens)
    with pytest.raises(HookError, match="a direct call of the Hugging Face model"):
        model.hf(tokens)
    with model.saes([second], use_error_term=True) as same:
        assert same.acts_to_saes == {RESID: second, MLP: other}
    assert model.acts_to_saes == {RESID: first, MLP: other}
    assert torch.equal(model(tokens), both)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(tokens), both)
    model.reset_saes(MLP)
    assert model.acts_to_saes == {RESID: first}
    assert f"{MLP}.hook_sae_output" not in model.hook_dict
    model.run_with_saes(tokens, saes=[other], reset_saes_end=False)
    assert model.acts_to_saes == {RESID: first, MLP: other}
    model.reset_saes()
    assert torch.equal(model(tokens), plain)
    with pytest.raises(HookError, match="matches nothing"):
        model.run_with_cache(tokens, names_filter=f"{RESID}.hook_sae_acts_post")


def test_only_what_is_needed_runs(model: HookedModel, tokens: Tensor) -> None:
    """With an SAE, too, the forward ends after the last hook."""
    late = sae_at("blocks.3.hook_resid_post")
    late.encode = None  # would fail
    calls: list[int] = []
    handle = model.hf.transformer.h[3].register_forward_hook(lambda *_: calls.append(1))
    name = f"{RESID}.hook_sae_acts_post"
    _, cache = model.run_with_cache_with_saes(
        tokens, saes=[sae_at(RESID)], names_filter=name, return_type=None
    )
    handle.remove()
    assert list(cache) == [name]
    assert not calls


def test_a_hook_that_cannot_be_changed_takes_no_sae(tiny_model: Callable[..., Path]) -> None:
    """Found when it is attached, and not by the first forward."""
    mixture = HookedModel.from_pretrained(tiny_model("mixtral"), dtype="float32", device="cpu")
    with pytest.raises(HookError, match="can be read but not changed, so nothing can stand in its place"):
        mixture.add_sae(sae_at("blocks.1.mlp.hook_expert_weights"))


def test_what_cannot_be_attached(model: HookedModel) -> None:
    with pytest.raises(HookError, match="matches nothing"):
        model.add_sae(sae_at("blocks.2.hook_resid_pots"))
    with pytest.raises(HookError, match="does not say where it belongs"):
        model.add_sae(sae_at(""))
    with pytest.raises(HookError, match="expected an SAE with the methods encode and decode"):
        model.add_sae(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    wrong = sae_at(RESID)
    wrong.decode = lambda features: features
    with pytest.raises(HookError, match="gave shape"):
        model.run_with_saes("My lord", saes=[wrong])


# SAELens' programs


@pytest.fixture(scope="module")
def texts(text_file: Path) -> Dataset:
    paragraphs = text_file.read_text(encoding="utf-8").split("\n\n")
    return Dataset.from_dict({"text": [text for text in paragraphs if len(text) > 200][:150]})


@pytest.fixture(autouse=True)
def _noise_of_saelens() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"(?s).*(Dataset is not tokenized|fewer samples|This SAE has non-empty).*"
        )
        yield


def test_an_sae_is_trained_and_judged(model: HookedModel, texts: Dataset, tmp_path: Path) -> None:
    cfg = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE),
        hook_name=RESID,
        is_dataset_tokenized=False,
        streaming=False,
        context_size=32,
        training_tokens=2048,
        train_batch_size_tokens=256,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(tmp_path / "sae"),
        save_final_checkpoint=False,
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=texts, override_model=model)
    sae = runner.run()
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert loaded.cfg.metadata.hook_name == RESID
    judged, _ = run_evals(
        sae,
        runner.activations_store,
        model,
        ActivationScaler(),
        eval_config=get_eval_everything_config(
            batch_size_prompts=4, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1
        ),
    )
    losses = judged["model_performance_preservation"]
    assert losses["ce_loss_without_sae"] < losses["ce_loss_with_sae"]
    tokens = model.to_tokens("My lord, I came to see your father's funeral")
    assert model.run_with_saes(tokens, saes=[loaded]).isfinite().all()


def test_batches_are_those_of_a_bridge(model: HookedModel, texts: Dataset) -> None:
    """The same tokens and activations, from text."""
    here, there = (
        ActivationsStore(
            lens_model,
            texts,
            streaming=False,
            hook_name=RESID,
            hook_head_index=None,
            context_size=32,
            d_in=D_IN,
            n_batches_in_buffer=8,
            total_training_tokens=4096,
            store_batch_size_prompts=8,
            train_batch_size_tokens=64,
            prepend_bos=True,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
        )
        for lens_model in (model, boot(MODEL_PATH))
    )
    ours, theirs = here.get_batch_tokens(), there.get_batch_tokens()
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(
        here.get_activations(ours), there.get_activations(theirs), atol=1e-3, rtol=1e-4
    )


def test_a_cache_of_activations_is_made(
    model: HookedModel, texts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_lens.cache_activations_runner.load_model", lambda **_: model)
    cfg = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name="",
        model_batch_size=4,
        hook_name=RESID,
        d_in=D_IN,
        training_tokens=512,
        context_size=32,
        new_cached_activations_path=str(tmp_path / "cache"),
        streaming=False,
        device="cpu",
        buffer_size_gb=0.001,
    )
    cached = CacheActivationsRunner(cfg, override_dataset=texts).run()
    row = cached[0]
    _, cache = model.run_with_cache(torch.tensor([row["token_ids"]]), names_filter=RESID)
    torch.testing.assert_close(torch.tensor(row[RESID]), cache[RESID][0], atol=1e-3, rtol=1e-4)
