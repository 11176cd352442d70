"""Paths are those of PyTorch's hooks on a plain Hugging Face model, and of the split inputs of TransformerLens."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore import patching
from actstore.errors import HookError, ModelError, PatchError
from actstore.hooks.model import HookedModel
from tests.parity import bridge

TinyModel = Callable[..., Path]
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "gemma2": {"sliding_window": 4},
    "gpt_neox": {},
}
CORRUPTED = torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(4))
CLEAN = torch.where((torch.arange(7) == 2) | (torch.arange(7) == 5), 17, CORRUPTED)
N_LAYERS, N_HEADS, D_HEAD = 3, 4, 16


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 6]


def mean_difference(logits: Tensor) -> Tensor:
    return difference(logits).mean()


class Plain:
    """A model of Hugging Face, with PyTorch's hooks, and the weights of its parts by hand."""

    def __init__(self, folder: Path, family: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.family = family
        base = self.model.base_model
        self.layers = base.h if family == "gpt2" else base.layers
        self.clean, self.corrupted = self.values(CLEAN), self.values(CORRUPTED)

    def attention(self, layer: int) -> Any:
        name = {"gpt2": "attn", "gpt_neox": "attention"}.get(self.family, "self_attn")
        return getattr(self.layers[layer], name)

    def out(self, layer: int) -> Any:
        name = {"gpt2": "c_proj", "gpt_neox": "dense"}.get(self.family, "o_proj")
        return getattr(self.attention(layer), name)

    def norm(self, layer: int) -> Any:
        return self.layers[layer].ln_1 if self.family == "gpt2" else self.layers[layer].input_layernorm

    def values(self, tokens: Tensor) -> dict[tuple[str, int], Tensor]:
        """Streams into layers and into MLPs' norms, z, and outputs of MLPs."""
        kept: dict[tuple[str, int], Tensor] = {}
        handles = []

        def keep(name: str, layer: int) -> Any:
            def before(_module: Any, args: Any, kwargs: Any) -> None:
                kept[name, layer] = (args[0] if args else kwargs["hidden_states"]).clone()

            return before

        for layer, block in enumerate(self.layers):
            modules = {"stream": block, "z": self.out(layer)}
            modules["mid"] = self.before_mlp(layer)
            for name, module in modules.items():
                handles.append(module.register_forward_pre_hook(keep(name, layer), with_kwargs=True))
            written = block.post_feedforward_layernorm if self.family == "gemma2" else block.mlp
            handles.append(
                written.register_forward_hook(
                    lambda _m, _a, out, layer=layer: kept.__setitem__(("mlp", layer), out.clone())
                )
            )
        with torch.no_grad():
            kept["logits", 0] = self.model(tokens).logits
        for handle in handles:
            handle.remove()
        return kept

    def before_mlp(self, layer: int) -> Any:
        block = self.layers[layer]
        if self.family == "gpt2":
            return block.ln_2
        return block.pre_feedforward_layernorm if self.family == "gemma2" else block.post_attention_layernorm

    def sent(self, layer: int, heads: list[int]) -> Tensor:
        """What a change of these heads to their clean values adds to the stream."""
        z, clean = self.corrupted["z", layer], self.clean["z", layer]
        mixed = z.clone()
        for head in heads:
            part = slice(head * D_HEAD, (head + 1) * D_HEAD)
            mixed[..., part] = clean[..., part]
        with torch.no_grad():
            writes = [self.out(layer)(value) for value in (mixed, z)]
            if self.family == "gemma2":
                writes = [self.layers[layer].post_attention_layernorm(value) for value in writes]
        step: Tensor = writes[0] - writes[1]
        return step

    @contextmanager
    def patched(self, layer: int, head: int, component: str, sent: Tensor) -> Iterator[None]:
        """A context in which one head reads a stream with ``sent`` added, for one component."""
        with torch.no_grad():
            read = self.norm(layer)(self.corrupted["stream", layer] + sent)
        attention = self.attention(layer)
        if self.family == "gpt2":
            module = attention.c_attn
            start = "qkv".index(component) * N_HEADS * D_HEAD + head * D_HEAD
        elif self.family == "gpt_neox":
            module = attention.query_key_value
            start = (head * 3 + "qkv".index(component)) * D_HEAD
        else:
            module = getattr(attention, f"{component}_proj")
            start = head * D_HEAD
        with torch.no_grad():
            new = module.forward(read)

        def after(_module: Any, _args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[..., start : start + D_HEAD] = new[..., start : start + D_HEAD]
            return out

        handle = module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def mlp_patched(self, layer: int, sent: Tensor) -> Iterator[None]:
        """A context in which the MLP reads a stream with ``sent`` added."""
        with torch.no_grad():
            read = self.before_mlp(layer).forward(self.corrupted["mid", layer] + sent)
            new = self.layers[layer].mlp.forward(read)
        handle = self.layers[layer].mlp.register_forward_hook(lambda _m, _a, _out: new)
        try:
            yield
        finally:
            handle.remove()

    def measured(self) -> Tensor:
        with torch.no_grad():
            return difference(self.model(CORRUPTED).logits)


@pytest.fixture(params=FAMILIES)
def both(tiny_model: TinyModel, request: pytest.FixtureRequest) -> tuple[HookedModel, Plain]:
    folder = tiny_model(request.param, **FAMILIES[request.param])
    return HookedModel.from_pretrained(folder, dtype="float32", device="cpu"), Plain(folder, request.param)


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_heads_reach_heads_as_by_hand(both: tuple[HookedModel, Plain], component: str) -> None:
    """Every pair of heads, by packed rows and whole rows; grouped queries have two heads of keys and values."""
    model, plain = both
    n_to = model.cfg.n_heads if component == "q" else model.cfg.n_key_value_heads
    expected = plain.measured()[:, None, None, None, None].repeat(1, N_LAYERS, N_HEADS, N_LAYERS, n_to)
    for layer, head in [(0, 1), (0, 3), (1, 2)]:
        sent = plain.sent(layer, [head])
        for to_layer in range(layer + 1, N_LAYERS):
            for to_head in range(n_to):
                with plain.patched(to_layer, to_head, component, sent):
                    expected[:, layer, head, to_layer, to_head] = plain.measured()
    results = [
        patching.path_patch(
            model,
            CORRUPTED,
            CLEAN,
            difference,
            "heads",
            component,
            positions=positions,
            engine=engine,
            max_tokens=n,
        )
        for engine, positions, n in [
            ("packed rows", -1, None),
            ("packed rows", None, 60),
            ("whole rows", -1, None),
        ]
    ]
    for result in results:
        assert [axis.name for axis in result.axes][1:4] == ["layer", "head", "to_layer"]
        assert result.axes[4].name == ("to_head" if n_to == N_HEADS else "to_kv_head")
        for layer, head in [(0, 1), (0, 3), (1, 2)]:
            torch.testing.assert_close(
                result.values[:, layer, head], expected[:, layer, head], atol=1e-5, rtol=0
            )
        # Nothing is sent back, or within a layer.
        for layer in range(N_LAYERS):
            unsent = result.values[:, layer, :, : layer + 1]
            assert (unsent == result.corrupted[:, None, None, None]).all()
    assert (expected[:, 0, 1, 1:] - plain.measured()[:, None, None]).abs().min() > 1e-7
    torch.testing.assert_close(results[0].values, results[2].values, atol=1e-5, rtol=0)


def test_groups_send_and_receive_together_as_by_hand(both: tuple[HookedModel, Plain]) -> None:
    """A head and an MLP send; a query and another MLP receive, which in parallel blocks reads the same stream."""
    model, plain = both
    mlp = plain.clean["mlp", 0] - plain.corrupted["mlp", 0]
    sent = plain.sent(0, [1, 2]) + mlp
    expected = []
    with plain.patched(1, 3, "q", sent), plain.mlp_patched(2, sent):
        expected.append(plain.measured())
    with plain.mlp_patched(0, plain.sent(0, [1, 2])):
        # In the same layer, an MLP is behind the heads, and no MLP before itself.
        expected.append(
            plain.measured() if plain.family != "gpt_neox" else difference(plain.corrupted["logits", 0])
        )
    senders = [[(0, 1), (0, 2), (0, "mlp")]]
    receivers = [[(1, 3, "q"), (2, "mlp")], (0, "mlp")]
    for engine in ("packed rows", "whole rows"):
        result = patching.path_patch(
            model, CORRUPTED, CLEAN, difference, senders, receivers, positions=-1, engine=engine
        )
        assert result.axes[1].labels == ("1.3.q and mlp 2", "mlp 0")
        torch.testing.assert_close(result.values.T, torch.stack(expected), atol=1e-5, rtol=0)


def test_logits_receive_what_is_added_to_the_last_stream(both: tuple[HookedModel, Plain]) -> None:
    model, plain = both
    base = plain.model.base_model
    final = (
        base.ln_f
        if plain.family == "gpt2"
        else base.final_layer_norm
        if plain.family == "gpt_neox"
        else base.norm
    )
    sent = plain.sent(1, [0]) + plain.clean["mlp", 2] - plain.corrupted["mlp", 2]
    handle = final.register_forward_pre_hook(lambda _m, args: (args[0] + sent,))
    expected = plain.measured()
    handle.remove()
    result = patching.path_patch(
        model, CORRUPTED, CLEAN, difference, [[(1, 0), (2, "mlp")]], "logits", positions=-1
    )
    torch.testing.assert_close(result.values[:, 0], expected, atol=1e-5, rtol=0)
    assert result.hook == "direct paths to logits"


def split_inputs(folder: Path, source: tuple[int, int], component: str) -> Tensor:
    """The grid of TransformerLens 4, by hand on the Bridge of the version that is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = bridge.boot(folder)
        layer, head = source
        name = f"blocks.{layer}.attn.hook_z"
        _, clean = theirs.run_with_cache(CLEAN)
        _, corrupted = theirs.run_with_cache(CORRUPTED)
        steps = (clean[name] - corrupted[name]).view(2, 7, N_HEADS, D_HEAD)[:, :, head]
        sent = steps @ theirs.blocks[layer].attn.W_O[head]
        theirs.set_use_split_qkv_input(True)
        values = torch.zeros(N_LAYERS, N_HEADS)
        for to_layer in range(layer + 1, N_LAYERS):
            for to_head in range(N_HEADS):

                def add(value: Tensor, hook: Any, to_head: int = to_head) -> Tensor:
                    value = value.clone()
                    value[:, :, to_head] += sent
                    return value

                point = f"blocks.{to_layer}.attn.hook_{component}_input"
                logits = theirs.run_with_hooks(CORRUPTED, fwd_hooks=[(point, add)])
                values[to_layer, to_head] = mean_difference(logits)
    return values


@pytest.mark.parametrize(
    ("family", "component"), [("gpt2", "q"), ("gpt2", "k"), ("gpt2", "v"), ("llama", "q")]
)
def test_direct_paths_are_those_of_transformer_lens(
    tiny_model: TinyModel, family: str, component: Any
) -> None:
    folder = tiny_model(family)
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    _, clean = model.run_with_cache(CLEAN)
    _, corrupted = model.run_with_cache(CORRUPTED)
    values = patching.get_act_patch_direct_path(
        model, CORRUPTED, clean, corrupted, mean_difference, 0, 2, component, verbose=False
    )
    torch.testing.assert_close(values, split_inputs(folder, (0, 2), component), atol=1e-4, rtol=0)
    every = patching.get_act_patch_direct_path_all_sources(
        model, CORRUPTED, clean, corrupted, mean_difference, component
    )
    assert every.shape == (N_LAYERS, N_HEADS, N_LAYERS, N_HEADS)
    torch.testing.assert_close(every[0, 2], values, atol=1e-5, rtol=0)
    assert (every[1, :, :2] == 0).all()
    assert (every[1, :, 2] != 0).all()


@pytest.mark.parametrize(
    "family",
    [
        "gpt_neo",
        "gptj",
        "mistral",
        "mixtral",
        "gemma",
        "gemma3_text",
        "phi",
        "phi3",
        "opt",
        "qwen2_moe",
        "qwen3",
    ],
)
def test_two_layers_are_enough_in_other_families(tiny_model: TinyModel, family: str) -> None:
    """Packed rows run the layers of sender and receiver; whole rows run the model with all else frozen."""
    model = HookedModel.from_pretrained(tiny_model(family), dtype="float32", device="cpu")
    senders = [(0, 1), (0, "mlp"), [(0, 2), (1, 0), (1, "mlp")]]
    receivers = [(1, 3, "q"), (2, 0, "k"), [(2, 1, "v"), (1, "mlp")], (2, "mlp"), "logits"]
    fast, slow = (
        patching.path_patch(
            model, CORRUPTED, CLEAN, difference, senders, receivers, positions=[3, -1], engine=engine
        )
        for engine in ("packed rows", "whole rows")
    )
    torch.testing.assert_close(fast.values, slow.values, atol=1e-5, rtol=0)
    assert (slow.difference.abs().amax((0, 1)) > 1e-5).all()


def test_functions_on_hooks_are_part_of_paths(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    before = patching.path_patch(model, CORRUPTED, CLEAN, difference, [(0, 1)], "q", positions=-1)
    with model.hooks([("blocks.1.hook_mlp_out", lambda value, hook: value * 2)]):
        during = patching.path_patch(model, CORRUPTED, CLEAN, difference, [(0, 1)], "q", positions=-1)
    assert during.engine == "whole rows: there are functions on its hooks"
    assert (during.values - before.values).abs().max() > 1e-4


def test_one_sender_and_one_receiver_need_no_list(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    arguments = (model, CORRUPTED, CLEAN, difference)
    for sender, receiver in (((0, 1), (2, 3, "q")), ((0, "mlp"), (2, "mlp"))):
        alone = patching.path_patch(*arguments, sender, receiver)
        assert torch.equal(alone.values, patching.path_patch(*arguments, [sender], [receiver]).values)


def test_what_does_not_fit_is_refused(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    arguments = (model, CORRUPTED, CLEAN, difference)
    for senders, receivers, text in [
        ([(3, 0)], "q", r"\(3, 0\) is not in this model, which has layers 0 to 2"),
        ([(0, 4)], "q", r"which has heads 0 to 3"),
        (
            [(0, 1)],
            [(1, 2, "k")],
            r"has heads 0 to 1 of keys and values; number 2 of the queries reads number 1",
        ),
        ([(0, 1)], [(1, 4, "k")], r"which has heads 0 to 1 there"),
        ([(0, 1)], [(1, 2, "z")], r'give \(layer, head, "q"\)'),
        ([(0, 1)], [["logits", (1, 0, "q")]], "give them a cell of their own"),
        ([0], "q", "a sender is 0"),
        ("all", "q", "senders is 'all'"),
        ([(0, 1)], [], r"receivers is \[\]"),
    ]:
        with pytest.raises(PatchError, match=text):
            patching.path_patch(*arguments, senders, receivers)
    _, cache = model.run_with_cache(CLEAN, names_filter="blocks.0.attn.hook_z")
    with pytest.raises(HookError, match=r"blocks\.1\.attn\.hook_z"):
        patching.path_patch(model, CORRUPTED, cache, difference, [(1, 0)], "q")
    with pytest.raises(PatchError, match="a number for each prompt"):
        patching.get_act_patch_direct_path(model, CORRUPTED, CLEAN, None, difference, 0, 1)
    with pytest.raises(PatchError, match="component is 'z'"):
        patching.get_act_patch_direct_path(model, CORRUPTED, CLEAN, None, difference, 0, 1, "z")  # type: ignore[arg-type]


def test_a_model_whose_layers_join_positions_runs_as_whole_rows(tiny_model: TinyModel) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    module = plain.base_model.layers[1].mlp
    forward = module.forward
    module.forward = lambda hidden: forward(hidden) + hidden.cumsum(1) / 10
    model = HookedModel(plain, check=False)
    result = patching.path_patch(model, CORRUPTED, CLEAN, difference, "heads", "q")
    assert result.engine.startswith("whole rows: unpatched rows ended")
    with pytest.raises(ModelError, match="unpatched rows ended"):
        patching.path_patch(model, CORRUPTED, CLEAN, difference, "heads", "q", engine="packed rows")
