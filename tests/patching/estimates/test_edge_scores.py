"""Scores of edges are finite differences of plain models in which one reader alone sees another stream."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore import patching
from actstore.errors import ModelError, PatchError
from actstore.hooks.model import HookedModel
from actstore.patching.estimates.norm_jacobian import NormJacobian

TinyModel = Callable[..., Path]
CORRUPTED = torch.randint(2, 300, (2, 6), generator=torch.Generator().manual_seed(1))
CLEAN = CORRUPTED.clone()
CLEAN[0, 2], CLEAN[1, 3], CLEAN[:, 4] = 7, 9, 11
STEP = 1e-3


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -2, 6]


def load(folder: Path) -> HookedModel:
    return HookedModel.from_pretrained(folder, dtype="float32", device="cpu")


class PlainModel:
    """A Hugging Face model in float64, with PyTorch's hooks alone."""

    def __init__(self, folder: Path, family: str) -> None:
        self.family = family
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self.model = loaded.double().eval()
        base = self.model.base_model
        self.layers = base.h if family in ("gpt2", "gptj") else base.layers
        self.n_kv_heads = 4 if family in ("gpt2", "gptj", "gpt_neox", "phi") else 2

    def part(self, layer: int, name: str) -> Any:
        names = {
            "gpt2": {"ln1": "ln_1", "ln2": "ln_2", "o": "attn.c_proj", "mlp": "mlp"},
            "gptj": {"ln1": "ln_1", "o": "attn.out_proj", "mlp": "mlp"},
            "gpt_neox": {"ln1": "input_layernorm", "ln2": "post_attention_layernorm", "mlp": "mlp"}
            | {"o": "attention.dense"},
        }
        llama = {
            "ln1": "input_layernorm",
            "ln2": "post_attention_layernorm",
            "o": "self_attn.o_proj",
            "mlp": "mlp",
        }
        gemma = llama | {"ln2": "pre_feedforward_layernorm", "post": "post_attention_layernorm"}
        gemma["mlp"] = "post_feedforward_layernorm"
        own = gemma if self.family == "gemma2" else names.get(self.family, llama)
        return self.layers[layer].get_submodule(own[name])

    def written(self, tokens: Tensor) -> dict[str, Tensor]:
        """What each part adds to the stream, and the stream into each layer (``x0``, ...)."""
        values: dict[str, Tensor] = {}
        handles = []
        for number, layer in enumerate(self.layers):

            def stream(_m: Any, args: Any, kwargs: Any, number: int = number) -> None:
                values[f"x{number}"] = args[0] if args else kwargs["hidden_states"]

            def heads(module: Any, args: Any, _out: Any, number: int = number) -> None:
                z = args[0].view(*args[0].shape[:2], 4, -1)
                weight = module.weight if self.family == "gpt2" else module.weight.T
                for head in range(4):
                    rows = slice(head * z.shape[-1], (head + 1) * z.shape[-1])
                    values[f"a{number}.h{head}"] = z[:, :, head] @ weight[rows]
                values[f"o{number}"] = _out

            def mlp(_m: Any, _a: Any, out: Any, number: int = number) -> None:
                values[f"m{number}"] = out

            handles.append(layer.register_forward_pre_hook(stream, with_kwargs=True))
            handles.append(self.part(number, "o").register_forward_hook(heads))
            handles.append(self.part(number, "mlp").register_forward_hook(mlp))
        with torch.no_grad():
            self.model(tokens)
        for handle in handles:
            handle.remove()
        values["input"] = values["x0"]
        return values

    def with_reader(self, reader: str, steps: dict[str, Tensor], stream: Tensor) -> Tensor:
        """Metric of the corrupted run in which one reader sees its stream plus a step.

        Args:
            reader: its name.
            steps: steps by name of what was written; ``all`` is taken.
            stream: the stream into the layer of the reader.
        """
        step = steps["all"]
        if reader == "logits":
            # A step of the stream behind the last layer.
            handle = self.layers[-1].register_forward_hook(
                lambda _m, _a, out: (out[0] + step, *out[1:]) if isinstance(out, tuple) else out + step
            )
        elif reader.startswith("m"):
            layer = int(reader[1:])
            if self.family in ("gptj", "phi"):  # the norm is that of attention
                norm = self.part(layer, "ln1")
                handle = self.layers[layer].mlp.register_forward_pre_hook(
                    lambda _m, _a: (norm(stream + step),)
                )
            else:
                handle = self.part(layer, "ln2").register_forward_pre_hook(lambda _m, args: (args[0] + step,))
        else:
            layer, head, which = int(reader[1]), int(reader[-4]), reader[-2]
            handle = self._head(layer, head, which, self.part(layer, "ln1")(stream + step))
        with torch.no_grad():
            number = metric(self.model(CORRUPTED).logits).mean()
        handle.remove()
        return number

    def _head(self, layer: int, head: int, which: str, normed: Tensor) -> Any:
        """Let a projection of attention give one head from another input."""
        place = "qkv".index(which)
        if self.family == "gpt2":
            module = self.layers[layer].attn.c_attn
            columns = slice(place * 64 + head * 16, place * 64 + head * 16 + 16)
        elif self.family == "gpt_neox":
            module = self.layers[layer].attention.query_key_value
            columns = slice(head * 48 + place * 16, head * 48 + place * 16 + 16)
        else:
            attention = self.layers[layer].attn if self.family == "gptj" else self.layers[layer].self_attn
            module = getattr(attention, f"{which}_proj")
            columns = slice(head * 16, head * 16 + 16)

        def put(module: Any, _args: Any, out: Tensor) -> Tensor:
            new = out.clone()
            new[..., columns] = module.forward(normed)[..., columns]
            return new

        return module.register_forward_hook(put)


CASES = {
    "gpt2": ("a1.h2<q>", "a2.h0<k>", "a2.h3<v>", "m0", "m2", "logits"),
    "llama": ("a1.h3<q>", "a2.kv1<k>", "a2.kv0<v>", "m0", "m2", "logits"),
    "gemma2": ("a1.h3<q>", "a2.kv1<k>", "a2.kv0<v>", "m1", "logits"),
    "gpt_neox": ("a1.h2<q>", "a2.h0<k>", "a2.h3<v>", "m1", "logits"),
    "gptj": ("a2.h1<q>", "a1.h3<v>", "m2"),
    "qwen3": ("a1.h3<q>", "a2.kv1<k>", "m1"),
    "phi3": ("m1", "logits"),
}


@pytest.mark.parametrize("family", CASES)
def test_scores_are_finite_differences_of_the_plain_model(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    plain = PlainModel(folder, family)
    model = load(folder)
    result = patching.edge_scores(model, CORRUPTED, CLEAN, metric)
    clean, corrupted = plain.written(CLEAN), plain.written(CORRUPTED)
    is_parallel = family in ("gptj", "gpt_neox")
    checked = 0
    for reader in CASES[family]:
        layer = 3 if reader == "logits" else int(reader[1])
        for writer in (
            "input",
            *(f"{part}" for at in range(3) for part in (f"a{at}.h1", f"a{at}.h3", f"m{at}")),
        ):
            at = -1 if writer == "input" else int(writer[1])
            exists = at < layer or (at == layer and writer[0] == "a" and reader[0] == "m" and not is_parallel)
            score = result.scores[result.upstream.index(writer), result.downstream.index(reader)]
            assert bool(score.isnan()) == (not exists), (writer, reader)
            if not exists:
                continue
            step = clean[writer] - corrupted[writer]
            if family == "gemma2" and writer[0] == "a":
                # What the norm behind attention gives if one head has moved a little.
                post, whole = plain.part(at, "post"), corrupted[f"o{at}"]
                with torch.no_grad():
                    step = (post(whole + STEP * step) - post(whole - STEP * step)) / (2 * STEP)
            stream = corrupted[f"x{min(layer, 2)}"]
            ends = [plain.with_reader(reader, {"all": sign * STEP * step}, stream) for sign in (1, -1)]
            expected = float(ends[0] - ends[1]) / (2 * STEP)
            assert float(score) == pytest.approx(expected, rel=2e-3, abs=3e-4), (writer, reader)
            checked += abs(expected) > 3e-3
    assert checked >= len(CASES[family])
    assert result.corrupted == pytest.approx(
        float(metric(plain.model(CORRUPTED).logits).mean().detach()), abs=1e-4
    )


def test_the_logits_read_the_whole_step(tiny_model: TinyModel) -> None:
    """All that is written is the stream: scores of edges to the logits add up to what attribution says of it."""
    for family in ("llama", "opt", "phi", "mixtral"):
        model = load(tiny_model(family))
        scores = patching.edge_scores(model, CORRUPTED, CLEAN, metric)
        whole = patching.attribution(
            model, CORRUPTED, CLEAN, metric, hooks="resid_post", axes=("layer",)
        ).difference.mean(0)[-1]
        assert float(scores.scores[:, -1].sum()) == pytest.approx(float(whole), rel=1e-3, abs=1e-5), family
        from_input = scores.scores[0].nansum()
        first = patching.attribution(model, CORRUPTED, CLEAN, metric, hooks="resid_pre", axes=("layer",))
        assert float(from_input) == pytest.approx(float(first.difference.mean(0)[0]), rel=1e-3, abs=1e-5)


def test_one_number_for_all_prompts_and_a_cache(tiny_model: TinyModel) -> None:
    model = load(tiny_model("gpt2"))
    _, cache = model.run_with_cache(CLEAN)
    one = patching.edge_scores(model, CORRUPTED, cache, lambda logits: metric(logits).mean(), positions=None)
    by_prompt = patching.edge_scores(model, CORRUPTED, CLEAN, metric)
    torch.testing.assert_close(one.scores, by_prompt.scores, equal_nan=True)
    assert one.clean == pytest.approx(float(metric(model(CLEAN)).mean()))
    assert by_prompt.clean is not None


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_derivative_of_a_norm_is_that_of_autograd(tiny_model: TinyModel, family: str) -> None:
    model = load(tiny_model(family))
    path = model.architecture.ln1
    assert path is not None
    module = model.layers[1].get_submodule(path)
    generator = torch.Generator().manual_seed(2)
    value, step, gradient = (torch.randn(2, 4, 64, generator=generator) for _ in range(3))
    derivative = NormJacobian(module, model.architecture.norm, value)
    out, tangent = torch.autograd.functional.jvp(module, value, step)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(derivative.of_step(step), tangent)
    leaf = value.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf), leaf, gradient)
    torch.testing.assert_close(derivative.of_gradient(gradient), expected)
    assert not torch.allclose(out, value)


def test_edges_are_listed_saved_and_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    result = patching.edge_scores(load(tiny_model("llama")), CORRUPTED, CLEAN, metric)
    assert result.scores.shape == (1 + 3 * 5, 3 * (4 + 2 + 2 + 1) + 1)
    # From the input to all; from heads of layer l to its MLP, later layers and logits; from its MLP to these.
    n_edges = 28 + sum(4 * (1 + 9 * (2 - at) + 1) + 9 * (2 - at) + 1 for at in range(3))
    assert int(result.is_edge.sum()) == n_edges
    top = result.top(5)
    assert [abs(edge.score) for edge in top] == sorted((abs(edge.score) for edge in top), reverse=True)
    assert top[0].score == result[top[0].upstream, top[0].downstream]
    assert abs(top[0].score) == float(result.scores.abs().nan_to_num(nan=0.0).max())
    assert len(result.top(10**6)) == n_edges
    path = tmp_path / "edges.parquet"
    result.save(path)
    again = patching.EdgeScores.load(path)
    torch.testing.assert_close(again.scores, result.scores, rtol=0, atol=0, equal_nan=True)
    assert {**vars(again), "scores": 0} == {**vars(result), "scores": 0}
    table = pq.read_table(path).to_pylist()
    assert len(table) == n_edges
    assert all(result[row["upstream"], row["downstream"]] == row["score"] for row in table)
    assert f"{n_edges} edges from 16 parts" in repr(result)
    with pytest.raises(PatchError, match=r"there is no edge from 'm2' to 'm1'"):
        _ = result["m2", "m1"]
    with pytest.raises(PatchError, match=r"ends with '\.png'; choose \.parquet"):
        result.save(tmp_path / "edges.png")
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    with pytest.raises(PatchError, match="holds no scores of edges"):
        patching.EdgeScores.load(path)


def test_models_whose_edges_are_not_known_are_refused(tiny_model: TinyModel) -> None:
    model = load(tiny_model("gpt2"))
    with (
        model.hooks([(("mlp_out", 0), lambda value, hook: value * 2)]),
        pytest.raises(ModelError, match="there are functions on hooks"),
    ):
        patching.edge_scores(model, CORRUPTED, CLEAN, metric)
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    # Another reader of the stream than the table of families knows.
    layer = plain.model.layers[1]
    forward = layer.forward
    layer.forward = lambda stream, **others: forward(stream, **others) + 0.3 * stream.roll(1, -1)
    with pytest.raises(ModelError, match="so something else reads it"):
        patching.edge_scores(HookedModel(plain, check=False), CORRUPTED, CLEAN, metric)
