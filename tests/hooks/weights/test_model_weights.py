"""Views of weights against the values at modules of the plain Hugging Face model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.activations import ACT2FN

from actstore.errors import ModelError
from actstore.hooks.families.architectures import ARCHITECTURES
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.weights.model_weights import Weights
from actstore.hooks.weights.norms import NormWeights

TinyModel = Callable[..., Path]

CASES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    model_type: (model_type, {}) for model_type in ARCHITECTURES
} | {
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    # Heads that together are wider than the model.
    "gemma, wide heads": ("gemma", {"head_dim": 24}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 24}),
    "qwen2_moe with a plain layer": ("qwen2_moe", {"mlp_only_layers": [1]}),
}
QKV: Final = {
    "gpt2": ("attn.c_attn",),
    "gpt_neo": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    "gpt_neox": ("attention.query_key_value",),
    "gptj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "phi3": ("self_attn.qkv_proj",),
}
OUT: Final = {
    "gpt2": "attn.c_proj",
    "gpt_neo": "attn.attention.out_proj",
    "gpt_neox": "attention.dense",
    "gptj": "attn.out_proj",
    "opt": "self_attn.out_proj",
    "phi": "self_attn.dense",
}


@dataclass
class Loaded:
    """A model with a head, its weights, and the values at its modules in one forward."""

    hf: Any
    cfg: HookedConfig
    weights: Weights
    tokens: Tensor
    logits: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def layers_path(self) -> str:
        family = ARCHITECTURES[self.cfg.model_type]
        return f"{family.prefix}.{family.layers}"

    def passed(self, layer: int, module: str, *, side: str = "output") -> Tensor:
        """[batch, position, features]; the layer itself if no module is given."""
        values = self.outputs if side == "output" else self.inputs
        value = values[f"{self.layers_path}.{layer}.{module}".rstrip(".")]
        return value.view(*self.tokens.shape, -1)

    def qkv(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of the projections [batch, position, heads or kv heads, d_head]."""
        paths = QKV.get(self.cfg.model_type, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        values = tuple(self.passed(layer, path) for path in paths)
        n, kv, size = self.cfg.n_heads, self.cfg.n_key_value_heads, self.cfg.d_head
        if self.cfg.model_type == "gpt_neox":  # as its attention module does it
            values = values[0].view(*self.tokens.shape, n, 3 * size).chunk(3, dim=-1)
        elif len(values) == 1:
            values = torch.split(values[0], [n * size, kv * size, kv * size], dim=-1)
        q, k, v = (value.reshape(*self.tokens.shape, -1, size) for value in values)
        return q, k, v

    def is_mixture(self, layer: int) -> bool:
        module = self.hf.get_submodule(f"{self.layers_path}.{layer}")
        return hasattr(getattr(module, "mlp", None), "experts")


@pytest.fixture(scope="module")
def load(tiny_model: TinyModel) -> Callable[[str], Loaded]:
    done: dict[str, Loaded] = {}

    def make(case: str) -> Loaded:
        if case not in done:
            model_type, config = CASES[case]
            done[case] = run(tiny_model(model_type, **config))
        return done[case]

    return make


@pytest.fixture(params=CASES)
def loaded(request: pytest.FixtureRequest, load: Callable[[str], Loaded]) -> Loaded:
    return load(request.param)


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, HookedConfig, Weights]:
    """A model with its head, which can be changed without harm to other tests."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    family = ARCHITECTURES[hf.config.model_type]
    cfg = HookedConfig.of(hf.config, family)
    base = hf.get_submodule(family.prefix)
    return hf, cfg, Weights(base, hf.get_output_embeddings, family, cfg)


def run(folder: Path) -> Loaded:
    hf, cfg, weights = load_plain(folder)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            if isinstance(given, Tensor):
                inputs[name] = given
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    for name, module in hf.named_modules():
        module.register_forward_hook(keep(name), with_kwargs=True)
    tokens = torch.randint(2, cfg.d_vocab, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = hf(tokens, use_cache=False).logits
    return Loaded(hf, cfg, weights, tokens, logits, inputs, outputs)


def normalized(cfg: HookedConfig, x: Tensor, norm: NormWeights) -> Tensor:
    if cfg.normalization_type == "LN":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * norm.w + norm.b


def mlp_of(cfg: HookedConfig, x: Tensor, mlp: Any) -> Tensor:
    activate = ACT2FN[cfg.act_fn]
    if cfg.gated_mlp:
        hidden = activate(x @ mlp.W_gate + mlp.b_gate) * (x @ mlp.W_in + mlp.b_in)
    else:
        hidden = activate(x @ mlp.W_in + mlp.b_in)
    output: Tensor = hidden @ mlp.W_out + mlp.b_out
    return output


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=2e-5, rtol=2e-5)


def parameters(module: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


def test_queries_keys_and_values(loaded: Loaded) -> None:
    for layer, block in enumerate(loaded.weights.blocks):
        x = normalized(loaded.cfg, loaded.passed(layer, "", side="input"), block.ln1)
        q, k, v = loaded.qkv(layer)
        repeats = loaded.cfg.n_heads // loaded.cfg.n_key_value_heads
        close(torch.einsum("bpd,hde->bphe", x, block.attn.W_Q) + block.attn.b_Q, q)
        keys = torch.einsum("bpd,hde->bphe", x, block.attn.W_K) + block.attn.b_K
        values = torch.einsum("bpd,hde->bphe", x, block.attn.W_V) + block.attn.b_V
        for copy in range(repeats):
            close(keys[:, :, copy::repeats], k)
            close(values[:, :, copy::repeats], v)


def test_layers_from_their_weights(loaded: Loaded) -> None:
    """The whole layer is computed from weights, except the attention pattern: z comes from the model."""
    cfg = loaded.cfg
    has_post_norms = cfg.model_type in ("gemma2", "gemma3_text")
    for layer, block in enumerate(loaded.weights.blocks):
        before = loaded.passed(layer, "", side="input")
        out = OUT.get(cfg.model_type, "self_attn.o_proj")
        z = loaded.passed(layer, out, side="input").view(2, -1, cfg.n_heads, cfg.d_head)
        attention = torch.einsum("bphe,hed->bpd", z, block.attn.W_O) + block.attn.b_O
        close(attention, loaded.passed(layer, out.rpartition(".")[0]))
        if loaded.is_mixture(layer):
            continue
        if has_post_norms:
            attention = normalized(cfg, attention, block.ln1_post)
        stream = before if cfg.parallel_attn_mlp else before + attention
        ln2 = block.ln1 if cfg.model_type in ("gptj", "phi") else block.ln2
        mlp = mlp_of(cfg, normalized(cfg, stream, ln2), block.mlp)
        if has_post_norms:
            mlp = normalized(cfg, mlp, block.ln2_post)
        close(before + attention + mlp, loaded.passed(layer, ""))


def test_embeddings_are_what_the_stream_begins_with(loaded: Loaded) -> None:
    stream = loaded.weights.W_E[loaded.tokens]
    if loaded.cfg.positional_embedding_type == "standard":
        stream = stream + loaded.weights.W_pos[: loaded.tokens.shape[1]]
        assert loaded.weights.W_pos.shape == (loaded.cfg.n_ctx, loaded.cfg.d_model)
    else:
        with pytest.raises(ModelError, match="no W_pos: positions of this model are rotations"):
            _ = loaded.weights.W_pos
    assert torch.equal(stream, loaded.passed(0, "", side="input"))


def test_logits_from_the_last_residual_stream(loaded: Loaded) -> None:
    cfg, weights = loaded.cfg, loaded.weights
    final = loaded.passed(cfg.n_layers - 1, "")
    ones = NormWeights(torch.ones(cfg.d_model), torch.zeros(cfg.d_model))
    logits = normalized(cfg, final, ones) * weights.ln_final.w @ weights.W_U + weights.folded_b_U
    unfolded = normalized(cfg, final, weights.ln_final) @ weights.W_U + weights.b_U
    cap = cfg.output_logits_soft_cap
    for computed in (logits, unfolded):
        close(cap * torch.tanh(computed / cap) if cap else computed, loaded.logits)


def test_the_gain_is_not_applied_twice(loaded: Loaded) -> None:
    """Stacks contain the gain, so the weight that went with stacks without it is an error."""
    with pytest.raises(ModelError, match="there is no folded_W_U: apply_ln_to_stack applies the gain"):
        _ = loaded.weights.folded_W_U


def test_shapes_of_stacked_weights(loaded: Loaded) -> None:
    cfg, weights = loaded.cfg, loaded.weights
    n, heads, d, size, m = cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.d_mlp
    for name in ("W_Q", "W_K", "W_V"):
        assert getattr(weights, name).shape == (n, heads, d, size)
        assert getattr(weights, name.replace("W", "b")).shape == (n, heads, size)
    assert weights.W_O.shape == (n, heads, size, d)
    assert weights.b_O.shape == (n, d)
    assert weights.QK.shape == weights.OV.shape == (n, heads, d, d)
    assert weights.W_E.shape == weights.W_U.mT.shape == (cfg.d_vocab, d)
    assert weights.b_U.shape == weights.folded_b_U.shape == (cfg.d_vocab,)
    assert len(weights.all_head_labels()) == n * heads
    for layer, block in enumerate(weights.blocks):
        assert torch.equal(weights.W_V[layer], block.attn.W_V)
        assert torch.equal(weights.b_K[layer], block.attn.b_K)
    if any(loaded.is_mixture(layer) for layer in range(n)):
        return
    assert weights.W_in.shape == weights.W_out.mT.shape == (n, d, m)
    assert weights.b_in.shape == (n, m)
    assert weights.b_out.shape == (n, d)
    if cfg.gated_mlp:
        assert weights.W_gate.shape == (n, d, m)
        assert weights.b_gate.shape == (n, m)
    else:
        with pytest.raises(ModelError, match="layer 0 of this model has no mlp.W_gate: .* is not gated"):
            _ = weights.W_gate


def test_weights_of_a_layer_are_views(loaded: Loaded) -> None:
    storages = parameters(loaded.hf)
    weights, cfg = loaded.weights, loaded.cfg
    for layer, block in enumerate(weights.blocks):
        views = [block.attn.W_Q, block.attn.W_O]
        if cfg.n_heads == cfg.n_key_value_heads:
            views += [block.attn.W_K, block.attn.W_V]
        if not loaded.is_mixture(layer):
            views += [block.mlp.W_in, block.mlp.W_out] + ([block.mlp.W_gate] if cfg.gated_mlp else [])
        for view in views:
            assert view.untyped_storage().data_ptr() in storages
    assert weights.W_U.untyped_storage().data_ptr() in storages
    is_scaled = cfg.model_type.startswith("gemma")
    assert (weights.W_E.untyped_storage().data_ptr() in storages) is not is_scaled
    if cfg.positional_embedding_type == "standard":
        assert weights.W_pos.untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "phi3", "llama", "opt"])
def test_writing_to_a_view_changes_the_model(model_type: str, tiny_model: TinyModel) -> None:
    hf, cfg, weights = load_plain(tiny_model(model_type))
    tokens = torch.arange(8)[None]
    before = hf(tokens).logits
    kept = [block.attn.W_Q.clone() for block in weights.blocks]
    weights.blocks[1].attn.W_O[2].zero_()
    ablated = hf(tokens).logits
    assert (before - ablated).abs().max() > 1e-3
    out = OUT.get(model_type, "self_attn.o_proj")
    path = f"{ARCHITECTURES[model_type].prefix}.{ARCHITECTURES[model_type].layers}"
    columns = slice(2 * cfg.d_head, 3 * cfg.d_head)

    def without_head(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = args[0].clone()
        z[..., columns] = 0
        return (z, *args[1:])

    other, _, _ = load_plain(tiny_model(model_type))
    other.get_submodule(f"{path}.1.{out}").register_forward_pre_hook(without_head)
    close(ablated, other(tokens).logits)
    weights.blocks[0].attn.W_Q[1] += 1.0
    for layer, block in enumerate(weights.blocks):
        expected = kept[layer].clone()
        if layer == 0:
            expected[1] += 1.0
        assert torch.equal(block.attn.W_Q, expected)


def test_heads_that_share_keys_have_copies_of_them(load: Callable[[str], Loaded]) -> None:
    loaded = load("llama")
    attn = loaded.weights.blocks[0].attn
    for value in (attn.W_K, attn.W_V):
        assert torch.equal(value[0], value[1])
        assert torch.equal(value[2], value[3])
        assert not torch.equal(value[1], value[2])
        assert value.untyped_storage().data_ptr() not in parameters(loaded.hf)


def test_circuits(loaded: Loaded) -> None:
    weights = loaded.weights
    close(weights.QK.AB, weights.W_Q @ weights.W_K.mT)
    close(weights.OV.AB, weights.W_V @ weights.W_O)
    close(weights.blocks[1].attn.QK.AB, weights.QK[1].AB)
    close(weights.blocks[1].attn.OV.AB, weights.OV[1].AB)


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3, wide heads"])
def test_composition_scores(case: str, load: Callable[[str], Loaded]) -> None:
    weights = load(case).weights
    qk, ov = weights.QK.AB, weights.OV.AB
    by_mode = {mode: weights.all_composition_scores(mode) for mode in ("Q", "K", "V")}
    for late in range(3):
        for early in range(3):
            for reading in range(4):
                for writing in range(4):
                    # Values are rows, so what is written first stands on the left.
                    w, r = ov[early, writing], {"Q": qk, "K": qk.mT, "V": ov}
                    for mode, scores in by_mode.items():
                        reader = r[mode][late, reading]
                        expected = (w @ reader).norm() / (w.norm() * reader.norm())
                        score = scores[early, writing, late, reading]
                        close(score, expected if early < late else torch.tensor(0.0))
    with pytest.raises(ValueError, match="mode is 'O'; it must be Q, K or V"):
        weights.all_composition_scores("O")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["gpt2", "opt", "llama with biases", "gptj", "gpt_neox sequential"])
def test_accumulated_bias_is_what_no_head_and_no_neuron_adds(case: str, tiny_model: TinyModel) -> None:
    model_type, config = CASES[case]
    hf, cfg, weights = load_plain(tiny_model(model_type, **config))
    for block in weights.blocks:
        block.attn.W_O.zero_()
        block.mlp.W_out.zero_()
    streams = []
    for module in hf.get_submodule(f"{ARCHITECTURES[model_type].prefix}.{ARCHITECTURES[model_type].layers}"):
        module.register_forward_hook(
            lambda _module, args, output: streams.append(
                ((output[0] if isinstance(output, tuple) else output) - args[0])[0, 0]
            )
        )
    hf(torch.arange(4)[None])
    assert weights.accumulated_bias(0).abs().max() == 0
    for layer in range(1, cfg.n_layers + 1):
        close(weights.accumulated_bias(layer), torch.stack(streams[:layer]).sum(0))
    attention = weights.accumulated_bias(2, include_mlp_biases=False)
    close(attention, weights.b_O[:2].sum(0))
    if cfg.parallel_attn_mlp:
        with pytest.raises(ModelError, match="layer 1 of this model has no stream between .* in parallel"):
            weights.accumulated_bias(1, mlp_input=True)
    else:
        close(weights.accumulated_bias(1, mlp_input=True), weights.accumulated_bias(1) + weights.b_O[1])
    for layer, mlp_input in ((-1, False), (4, False), (3, True)):
        with pytest.raises(ValueError, match=f"layer is {layer}; it must be 0 to {2 if mlp_input else 3}"):
            weights.accumulated_bias(layer, mlp_input=mlp_input)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_mixture_of_experts_has_no_neurons(model_type: str, load: Callable[[str], Loaded]) -> None:
    weights = load(model_type).weights
    for name in ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out"):
        expected = f"layer 0 of this model has no mlp.{name}: .*mixture of experts"
        with pytest.raises(ModelError, match=expected) as caught:
            getattr(weights, name)
        assert "\n" not in str(caught.value)
        with pytest.raises(ModelError, match="layer 2 of this model"):
            getattr(weights.blocks[2].mlp, name)
    assert weights.accumulated_bias(3).shape == (64,)


def test_a_plain_layer_among_mixtures_has_neurons(load: Callable[[str], Loaded]) -> None:
    weights = load("qwen2_moe with a plain layer").weights
    assert [block.mlp.is_mixture for block in weights.blocks] == [True, False, True]
    assert weights.blocks[1].mlp.W_in.shape == (64, 128)


@pytest.mark.parametrize("model_type", ["gptj", "phi"])
def test_a_shared_norm_is_not_ln2(model_type: str, load: Callable[[str], Loaded]) -> None:
    block = load(model_type).weights.blocks[0]
    with pytest.raises(ModelError, match="layer 0 of this model has no ln2: .* share one norm, ln1"):
        _ = block.ln2
    with pytest.raises(ModelError, match="layer 0 of this model has no ln1_post"):
        _ = block.ln1_post


def test_without_a_head(tiny_model: TinyModel) -> None:
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    config.num_hidden_layers = 2
    config.layer_types = None
    base = AutoModel.from_pretrained(tiny_model("llama"), config=config, dtype=torch.float32)
    family = ARCHITECTURES["llama"]
    weights = Weights(base, None, family, HookedConfig.of(config, family))
    for name in ("W_U", "b_U", "folded_b_U"):
        with pytest.raises(ModelError, match="without its language-model head; load it with the head"):
            getattr(weights, name)
    assert weights.W_Q.shape == (2, 4, 64, 16)
    assert weights.all_head_labels() == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0", "L1H1", "L1H2", "L1H3"]


def test_an_unknown_architecture_has_only_embeddings(tiny_model: TinyModel) -> None:
    hf, _, _ = load_plain(tiny_model("llama"))
    family = replace(ARCHITECTURES["llama"], attention=None, mlp=None, ln1=None, ln2=None, ln_final=None)
    weights = Weights(hf.model, lambda: hf.lm_head, family, HookedConfig.of(hf.config, family))
    assert weights.W_E.shape == weights.W_U.mT.shape == (300, 64)
    for name in ("W_Q", "W_O", "b_V", "QK", "OV", "W_in", "W_gate", "b_out", "ln_final", "folded_b_U"):
        with pytest.raises(ModelError, match="only the residual stream is known for this architecture"):
            getattr(weights, name)
    for name in ("ln1", "ln2"):
        with pytest.raises(ModelError, match="only the residual stream is known"):
            getattr(weights.blocks[0], name)
    with pytest.raises(ModelError, match="only the residual stream is known"):
        weights.accumulated_bias(1)


@pytest.mark.parametrize("model_type", ["gemma", "llama", "gpt2"])
def test_half_precision(model_type: str, tiny_model: TinyModel) -> None:
    hf, _, weights = load_plain(tiny_model(model_type), torch.bfloat16)
    tokens = torch.arange(8)
    assert torch.equal(weights.W_E[tokens], hf.get_input_embeddings()(tokens))
    assert weights.W_Q.dtype == torch.bfloat16
    assert weights.folded_b_U.dtype == torch.float32
    assert weights.accumulated_bias(2).dtype == torch.float32
    assert weights.all_composition_scores("V").dtype == torch.float32
    # 1 + weight would lose most of the weight's digits in bfloat16.
    is_gemma = model_type == "gemma"
    assert weights.ln_final.w.dtype == (torch.float32 if is_gemma else torch.bfloat16)
    if is_gemma:
        assert torch.equal(weights.ln_final.w - 1.0, 1.0 + hf.model.norm.weight.float() - 1.0)
