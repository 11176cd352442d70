"""Common uses of hooked models give the results of TransformerLens: attribution, induction scores, patching."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore.demo import MODEL_PATH
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.model import HookedModel
from tests.parity import bridge

pytestmark = pytest.mark.xdist_group("workflows")  # models are loaded once, in one process

TinyModel = Callable[..., Path]

TOLERANCE: Final = 5e-5
"""Tolerance relative to the largest value. TransformerLens computes attention eagerly; ours is the family's default
kernel.
"""

IOI: Final = (
    "When John and Mary went to the store, Mary gave a bottle to",
    "When John and Mary went to the store, John gave a bottle to",
)
CITIES: Final = ("The Eiffel Tower is in the city of", "The Colosseum is in the city of")
FAMILIES: Final = ("gpt2", "llama", "qwen2", "gemma", "gpt_neox")


def load(folder: Path) -> HookedModel:
    return HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu")


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def boot_folded(folder: Path) -> Any:
    """A Bridge whose norms' gains are folded into the weights after them, its own way to direct attribution.

    Value biases stay in z, where the model has them.
    """
    booted = bridge.boot(folder)
    with silent():
        booted.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)
    return booted


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> HookedModel:
    return load(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    return bridge.boot(smollm2)


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape
    assert float((actual - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


# Direct logit attribution


def attributions(
    model: HookedModel, tokens: Tensor, right: Tensor, wrong: Tensor
) -> tuple[Tensor, list[str]]:
    """The attribution of each head at the last position, [head of the model, row]; it must add up to the logit
    difference.
    """
    logits, cache = model.run_with_cache(tokens)
    rows = torch.arange(len(tokens))
    difference = logits[rows, -1, right] - logits[rows, -1, wrong]
    bias = (model.folded_b_U[right] - model.folded_b_U[wrong]).detach()
    parts = cache.decompose_resid(pos_slice=-1)
    assert_close(cache.logit_attrs(parts, right, wrong, pos_slice=-1).sum(0) + bias, difference)
    heads, labels = cache.stack_head_results(pos_slice=-1, return_labels=True, incl_remainder=True)
    shares = cache.logit_attrs(heads, right, wrong, pos_slice=-1)
    assert_close(shares.sum(0) + bias, difference)
    return shares[:-1], labels[:-1]


def their_attributions(
    folded: Any, tokens: Tensor, right: Tensor, wrong: Tensor
) -> tuple[Tensor, Sequence[str]]:
    with silent():
        _, cache = folded.run_with_cache(tokens)
        heads, labels = cache.stack_head_results(pos_slice=-1, return_labels=True)
        return cache.logit_attrs(heads, right, pos_slice=-1, incorrect_tokens=wrong), labels


@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_of_heads(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 300, (3, 12), generator=generator)
    right, wrong = torch.randint(2, 300, (2, 3), generator=generator)
    shares, labels = attributions(load(folder), tokens, right, wrong)
    wanted, their_labels = their_attributions(boot_folded(folder), tokens, right, wrong)
    assert_close(shares, wanted)
    assert labels == list(their_labels)


def test_who_is_the_indirect_object(ours: HookedModel, smollm2: Path) -> None:
    tokens = ours.to_tokens(IOI)
    right = torch.tensor([ours.to_single_token(name) for name in (" John", " Mary")])
    assert ours(tokens)[:, -1].argmax(-1).tolist() == right.tolist()
    shares, labels = attributions(ours, tokens, right, right.flip(0))
    wanted, their_labels = their_attributions(boot_folded(smollm2), tokens, right, right.flip(0))
    assert_close(shares, wanted)
    assert labels == list(their_labels)
    assert_close(shares, plain_attributions(ours.hf, tokens, right, right.flip(0)))
    mean = shares.mean(1)
    assert [labels[index] for index in mean.topk(3).indices] == ["L23H3", "L29H1", "L23H0"]
    assert labels[int(mean.argmin())] == "L29H0"


def plain_attributions(model: Any, tokens: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """The formula for a Llama, with plain torch hooks."""
    z: list[Tensor] = []
    streams: list[Tensor] = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, args: z.append(args[0][:, -1]))
        for layer in model.model.layers
    ]
    handles.append(
        model.model.norm.register_forward_pre_hook(lambda _module, args: streams.append(args[0][:, -1]))
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        scale = (streams[0].pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        weight = model.lm_head.weight
        directions = (weight[right] - weight[wrong]) * model.model.norm.weight / scale  # [row, d_model]
        n_heads = model.config.num_attention_heads
        shares = []
        for mixed, layer in zip(z, model.model.layers, strict=True):
            # z @ W_O @ direction, head by head; o_proj.weight is [d_model, head * d_head]
            projected = (directions @ layer.self_attn.o_proj.weight) * mixed
            shares.append(projected.unflatten(-1, (n_heads, -1)).sum(-1).T)
    return torch.cat(shares)


# Induction heads


def repeated(n_ids: int, bos: int, length: int, n_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    block = torch.stack([torch.randperm(n_ids, generator=generator)[:length] for _ in range(n_rows)])
    return torch.cat([torch.full((n_rows, 1), bos), block, block], dim=1)


def induction_scores(patterns: Tensor, length: int) -> Tensor:
    """Induction scores [layer, head] from patterns [layer, row, head, position, source]."""
    return patterns.diagonal(offset=1 - length, dim1=-2, dim2=-1)[..., -length:].mean(dim=(1, -1))


def scores_of_both(model: HookedModel, booted: Any, length: int, n_rows: int) -> tuple[Tensor, Tensor]:
    tokens = repeated(model.cfg.d_vocab, model.tokenizer.bos_token_id, length, n_rows)
    _, cache = model.run_with_cache(tokens, names_filter="blocks.*.attn.hook_pattern", return_type=None)
    with silent():
        _, theirs = booted.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
        patterns = torch.stack(
            [theirs[f"blocks.{layer}.attn.hook_pattern"] for layer in range(model.cfg.n_layers)]
        )
    return induction_scores(cache.stack_activation("pattern"), length), induction_scores(patterns, length)


def test_induction_heads_of_the_bundled_model() -> None:
    scores, wanted = scores_of_both(load(MODEL_PATH), bridge.boot(MODEL_PATH), 50, 4)
    assert_close(scores, wanted)
    assert scores[1].min() > 0.6
    assert scores[[0, 2, 3]].max() < 0.05


def test_induction_heads(ours: HookedModel, theirs: Any) -> None:
    scores, wanted = scores_of_both(ours, theirs, 30, 2)
    assert_close(scores, wanted)
    assert scores.flatten().topk(5).indices.tolist() == wanted.flatten().topk(5).indices.tolist()
    assert scores.max() > 0.8


# Activation patching


def patched(model: HookedModel, leaf: str, layer: int, clean: Tensor, corrupted: Tensor) -> Tensor:
    """The last logits [position, d_vocab] with one position patched each, all positions in one forward."""
    _, cache = model.run_with_cache(clean, names_filter=(leaf, layer), return_type=None)
    places = torch.arange(corrupted.shape[1])

    def patch(value: Tensor, *, hook: HookPoint) -> None:
        value[places, places] = cache[hook.name][0]

    batch = corrupted.repeat(len(places), 1)
    logits: Tensor = model.run_with_hooks(batch, fwd_hooks=[((leaf, layer), patch)])
    return logits[:, -1]


@pytest.mark.parametrize("leaf", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_whole_grid(tiny_model: TinyModel, family: str, leaf: str) -> None:
    """The grid is compared with TransformerLens' own patching, which runs one forward per cell."""
    folder = tiny_model(family)
    clean, corrupted = torch.randint(2, 300, (2, 1, 8), generator=torch.Generator().manual_seed(5))
    booted: Any = bridge.boot(folder)
    with silent():
        from transformer_lens import patching

        _, clean_cache = booted.run_with_cache(clean)
        wanted = getattr(patching, f"get_act_patch_{leaf}")(
            booted, corrupted, clean_cache, lambda logits: logits[0, -1, 7] - logits[0, -1, 9]
        )
    model = load(folder)
    logits = torch.stack([patched(model, leaf, layer, clean, corrupted) for layer in range(3)])
    assert_close(logits[..., 7] - logits[..., 9], wanted)
    assert wanted.std() > 0


LAYERS: Final = (0, 4, 23, 24, 29)
POSITIONS: Final = (1, 2, 3, 4, 6, 9)


def test_cells_of_a_real_model(ours: HookedModel, theirs: Any) -> None:
    clean, corrupted = (ours.to_tokens(text) for text in CITIES)
    assert clean.shape == corrupted.shape == (1, 10)
    paris, rome = ours.to_single_token(" Paris"), ours.to_single_token(" Rome")
    with silent():
        _, cache = theirs.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_resid_pre"))

    def cell(layer: int, position: int) -> Tensor:
        def patch(value: Tensor, hook: Any) -> Tensor:
            del hook
            value[:, position] = cache[f"blocks.{layer}.hook_resid_pre"][:, position]
            return value

        with silent():
            logits = theirs.run_with_hooks(
                corrupted, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)], return_type="logits"
            )
        last: Tensor = logits[0, -1]
        return last[paris] - last[rome]

    patched_logits = torch.stack([patched(ours, "resid_pre", layer, clean, corrupted) for layer in LAYERS])
    difference = patched_logits[:, POSITIONS, paris] - patched_logits[:, POSITIONS, rome]
    wanted = torch.stack([torch.stack([cell(layer, position) for position in POSITIONS]) for layer in LAYERS])
    assert_close(difference, wanted)
    # The corrupted run predicts Rome. At "iffel" before layer 24, and at the end after it, the clean stream gives
    # Paris.
    assert (difference[:, 0] < -4).all()
    assert (difference[:3, 2] > 0).all()
    assert (difference[3:, -1] > 0).all()


def test_attribution_is_the_gradient_of_the_plain_model(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    clean, corrupted = torch.randint(2, 300, (2, 1, 8), generator=torch.Generator().manual_seed(5))
    model = load(folder)
    name = "blocks.*.hook_resid_pre"
    _, cache = model.run_with_cache(clean, names_filter=name)
    logits, at = model.run_with_cache(corrupted, names_filter=name, grad=True)
    gradients = torch.autograd.grad(logits[0, -1, 7], list(at.values()))
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    streams: list[Tensor] = []
    for layer in plain.model.layers:
        layer.register_forward_pre_hook(lambda _module, args: streams.append(args[0]))
    wanted = torch.autograd.grad(plain(corrupted, use_cache=False).logits[0, -1, 7], streams)
    for ours, gradient in zip(gradients, wanted, strict=True):
        assert_close(ours, gradient)
    # To first order, patching gives what attribution says.
    step = (cache["resid_pre", 2] - at["resid_pre", 2].detach()) * 1e-3

    def move(value: Tensor, *, hook: HookPoint) -> Tensor:
        del hook
        return value + step

    moved = model.run_with_hooks(corrupted, fwd_hooks=[(("resid_pre", 2), move)])
    change = float(moved[0, -1, 7] - logits[0, -1, 7].detach())
    assert change == pytest.approx(float((step * gradients[2]).sum()), rel=0.02, abs=1e-6)


# Hooks are removed again


@pytest.mark.parametrize("leaf", ["hook_resid_pre", "attn.hook_z", "attn.hook_pattern", "mlp.hook_post"])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_stays_behind(tiny_model: TinyModel, leaf: str, error: type[BaseException] | None) -> None:
    model = load(tiny_model("llama"))
    tokens = torch.randint(2, 300, (2, 8), generator=torch.Generator().manual_seed(5))
    before = model(tokens)
    plain = model.hf(tokens, use_cache=False).logits.detach()

    def edit(value: Tensor, *, hook: HookPoint) -> Tensor:
        if error is not None and hook.layer() == 1:
            raise error(hook.name)
        return value * 0

    pairs = [(f"blocks.*.{leaf}", edit)]
    if error is None:
        assert not torch.equal(model.run_with_hooks(tokens, fwd_hooks=pairs), before)
    else:
        with pytest.raises(error, match="blocks.1"):
            model.run_with_hooks(tokens, fwd_hooks=pairs)
        with pytest.raises(error, match="blocks.1"), model.hooks(pairs):
            model.run_with_cache(tokens)
    assert torch.equal(model(tokens), before)
    assert torch.equal(model.hf(tokens, use_cache=False).logits, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())
