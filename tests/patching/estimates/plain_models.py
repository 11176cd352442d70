"""Forwards of Llama and GPT-2 in plain PyTorch, written from their definitions, which can hold parts constant."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Plain:
    """One forward of a small model. With ``by_rules`` what flows back are the coefficients of RelP."""

    weights: Mapping[str, Tensor]
    n_heads: int = 4
    n_kv_heads: int = 2
    by_rules: bool = False
    seen: dict[str, Tensor] = field(default_factory=dict)
    """Values by name of the hook."""

    def _see(self, name: str, value: Tensor) -> Tensor:
        value = value if value.requires_grad else value.requires_grad_()
        self.seen[name] = value
        return value

    def _held(self, value: Tensor) -> Tensor:
        return value.detach() if self.by_rules else value

    def _rms(self, x: Tensor, name: str, plus: float = 0.0) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return x / self._held(scale) * (self.weights[f"{name}.weight"] + plus)

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / self._held(scale) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float | None) -> Tensor:
        """Heads first: [head, position, d_head], keys and values of grouped heads."""
        repeats = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
        scores = query @ key.transpose(1, 2) * scale
        if cap is not None:
            scores = cap * (scores / cap).tanh()
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return self._held(scores.masked_fill(ahead, -math.inf).softmax(-1)) @ value

    def _act(self, function: Any, x: Tensor) -> Tensor:
        result: Tensor = function(x)
        return x * (result / x).detach() if self.by_rules else result


def llama(plain: Plain, tokens: Tensor, *, gemma2: bool = False) -> Tensor:
    """Logits [position, d_vocab] of ids [position]; of Llama, or of Gemma 2 with its caps and its four norms."""
    weights, plus = plain.weights, 1.0 if gemma2 else 0.0
    length, n_layers = len(tokens), 3
    x = weights["model.embed_tokens.weight"][tokens]
    if gemma2:
        x = x * math.sqrt(64)
    angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, 16, 2) / 16)).double()
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def rotated(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat([-second, first], -1) * sin

    for layer in range(n_layers):
        at = f"model.layers.{layer}"
        x = plain._see(f"blocks.{layer}.hook_resid_pre", x)
        normed = plain._rms(x, f"{at}.input_layernorm", plus)
        query, key, value = (
            (normed @ weights[f"{at}.self_attn.{one}_proj.weight"].T).view(length, -1, 16).transpose(0, 1)
            for one in "qkv"
        )
        scale, cap = (8**-0.5, 2.0) if gemma2 else (16**-0.5, None)
        z = plain._attend(rotated(query), rotated(key), value, scale, cap).transpose(0, 1)
        z = plain._see(f"blocks.{layer}.attn.hook_z", z)
        out = z.reshape(length, -1) @ weights[f"{at}.self_attn.o_proj.weight"].T
        if gemma2:
            out = plain._rms(out, f"{at}.post_attention_layernorm", plus)
        out = plain._see(f"blocks.{layer}.hook_attn_out", out)
        mid = plain._see(f"blocks.{layer}.hook_resid_mid", x + out)
        normed = plain._rms(mid, f"{at}.{'pre_feedforward' if gemma2 else 'post_attention'}_layernorm", plus)
        pre = plain._see(f"blocks.{layer}.mlp.hook_pre", normed @ weights[f"{at}.mlp.gate_proj.weight"].T)
        linear = normed @ weights[f"{at}.mlp.up_proj.weight"].T

        def gelu(x: Tensor) -> Tensor:
            return torch.nn.functional.gelu(x, approximate="tanh")

        act = plain._act(gelu if gemma2 else torch.nn.functional.silu, pre)
        # Half of the product's relevance goes to each factor.
        product = (act * linear.detach() + act.detach() * linear) / 2 if plain.by_rules else act * linear
        post = plain._see(f"blocks.{layer}.mlp.hook_post", product)
        out = post @ weights[f"{at}.mlp.down_proj.weight"].T
        if gemma2:
            out = plain._rms(out, f"{at}.post_feedforward_layernorm", plus)
        out = plain._see(f"blocks.{layer}.hook_mlp_out", out)
        x = mid + out
    logits = plain._rms(x, "model.norm", plus) @ weights["lm_head.weight"].T
    return 3.0 * (logits / 3.0).tanh() if gemma2 else logits


def gpt2(plain: Plain, tokens: Tensor) -> Tensor:
    """Logits [position, d_vocab] of GPT-2 for ids [position]."""
    weights, length = plain.weights, len(tokens)
    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:length]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh")

    for layer in range(3):
        at = f"transformer.h.{layer}"
        x = plain._see(f"blocks.{layer}.hook_resid_pre", x)
        three = linear(plain._layer_norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn")
        query, key, value = (part.view(length, 4, 16).transpose(0, 1) for part in three.chunk(3, -1))
        z = plain._attend(query, key, value, 16**-0.5, None).transpose(0, 1)
        z = plain._see(f"blocks.{layer}.attn.hook_z", z)
        out = plain._see(f"blocks.{layer}.hook_attn_out", linear(z.reshape(length, -1), f"{at}.attn.c_proj"))
        mid = plain._see(f"blocks.{layer}.hook_resid_mid", x + out)
        pre = plain._see(
            f"blocks.{layer}.mlp.hook_pre", linear(plain._layer_norm(mid, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        )
        post = plain._see(f"blocks.{layer}.mlp.hook_post", plain._act(gelu, pre))
        out = plain._see(f"blocks.{layer}.hook_mlp_out", linear(post, f"{at}.mlp.c_proj"))
        x = mid + out
    return plain._layer_norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T
