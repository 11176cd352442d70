"""Generation with hooks: its tokens are Hugging Face's, its steps those of forwards over all positions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actstore.errors import HookError, ModelError, TokensError
from actstore.hooks.capture.hook_point import HookPoint
from actstore.hooks.generation.steps import Steps
from actstore.hooks.model import HookedModel
from tests.parity.families import VARIANTS

TinyModel = Callable[..., Path]
PROMPT = torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(0))
N_NEW = 6
EDITED = ("gpt2", "gpt_neo-window", "gpt_neox", "gptj", "llama", "gemma2-window", "mistral-window", "mixtral")


def load(folder: Path, **options: Any) -> HookedModel:
    return HookedModel.from_pretrained(str(folder), dtype="float32", device="cpu", **options)


def tiny(tiny_model: TinyModel, variant: str) -> HookedModel:
    family, fields = VARIANTS[variant]
    return load(tiny_model(family, **fields))


@pytest.fixture(scope="module")
def llama(tiny_model: TinyModel) -> HookedModel:
    return load(tiny_model("llama"))


def greedy(model: HookedModel, prompt: Tensor = PROMPT, **options: Any) -> Any:
    return model.generate(prompt, N_NEW, do_sample=False, stop_at_eos=False, **options)


def one_by_one(model: HookedModel, tokens: Tensor) -> Tensor:
    """The greedy continuation by forwards over all positions, with the functions that are on hooks now."""
    for _ in range(N_NEW):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def assert_same(value: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_steps_are_those_of_a_forward_over_all_positions(
    tiny_model: TinyModel, variant: str, use_cache: bool
) -> None:
    """Tokens are those of Hugging Face alone, functions see each position once, and values are kept of all of them."""
    model = tiny(tiny_model, variant)
    plain: Any = AutoModelForCausalLM.from_pretrained(model.hf.name_or_path).eval()
    plain.generation_config.eos_token_id = None
    expected = plain.generate(PROMPT, max_new_tokens=N_NEW, do_sample=False)
    seen: dict[str, list[int]] = {}

    def look(value: Tensor, hook: HookPoint) -> None:
        seen.setdefault(hook.name, []).append(value.shape[2 if "pattern" in hook.name else 1])

    looked = ["blocks.1.hook_resid_post", "blocks.2.attn.hook_pattern", "blocks.0.attn.hook_q", "hook_embed"]
    names = [name for name in model.names if not name.endswith("hook_mlp_in")]
    with model.hooks([(looked, look)]):
        tokens, cache = greedy(model, use_past_kv_cache=use_cache, names_filter=names)
    assert torch.equal(tokens, expected)
    steps = [7, *[1] * N_NEW] if use_cache else [*range(7, 7 + N_NEW), 7 + N_NEW]
    assert seen == dict.fromkeys(seen, steps)
    assert seen.keys() == set(looked)
    _, whole = model.run_with_cache(tokens, names_filter=names)
    assert cache.keys() == whole.keys()
    for name in names:
        assert_same(cache[name], whole[name], name)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


@pytest.mark.parametrize("variant", EDITED)
def test_an_edit_at_every_step_is_that_of_forwards_over_all_positions(
    tiny_model: TinyModel, variant: str
) -> None:
    """Also where the edited value is kept from step to step, such as rotated keys, or only exists by hand."""
    model = tiny(tiny_model, variant)
    noise = torch.Generator().manual_seed(1)
    for name in model.names:
        if not name.startswith("blocks.1.") or "expert" in name:
            continue
        _, cache = model.run_with_cache(PROMPT, names_filter=name)
        # The same for every position and source, or steps would differ from a forward over all positions.
        value = cache[name]
        shape = [
            1 if value.ndim == 4 and name.endswith(("scores", "pattern")) else size
            for size in value.shape[2:]
        ]
        shape = [value.shape[1], 1, 1] if name.endswith(("scores", "pattern")) else shape
        factor = 1 + torch.rand(shape, generator=noise)

        def in_place(value: Tensor, hook: HookPoint, factor: Tensor = factor) -> None:
            value.mul_(factor)

        def returned(value: Tensor, hook: HookPoint, factor: Tensor = factor) -> Tensor:
            return value * factor

        for function in (in_place, returned):
            with model.hooks([(name, function)]):
                expected = one_by_one(model, PROMPT)
                tokens, kept = greedy(model, names_filter=["blocks.2.hook_resid_post", name])
                _, whole = model.run_with_cache(tokens, names_filter=["blocks.2.hook_resid_post", name])
            assert torch.equal(tokens, expected), name
            assert_same(kept[name], whole[name], name)
            assert_same(kept["resid_post", 2], whole["resid_post", 2], name)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_steering_is_that_of_a_plain_loop_with_a_pytorch_hook(tiny_model: TinyModel, family: str) -> None:
    model = load(tiny_model(family))
    plain: Any = AutoModelForCausalLM.from_pretrained(model.hf.name_or_path).eval()
    vector = torch.randn(64, generator=torch.Generator().manual_seed(3)) * 3
    assert_steered(model, plain, model.layers, vector, PROMPT, 1)


def assert_steered(
    model: HookedModel, plain: Any, layers: Any, vector: Tensor, tokens: Tensor, layer: int
) -> None:
    path = next(path for path, module in model.hf.named_modules() if module is layers[layer])
    before = greedy(model, tokens)

    def steer(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    expected = tokens
    handle = plain.get_submodule(path).register_forward_hook(steer)
    with torch.no_grad():
        for _ in range(N_NEW):
            logits = plain(expected, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    handle.remove()
    with model.hooks([(("resid_post", layer), lambda value, hook: value + vector)]):
        steered = greedy(model, tokens)
    assert torch.equal(steered, expected)
    assert not torch.equal(steered, before)
    assert torch.equal(greedy(model, tokens), before)


def test_a_real_model(smollm2: Path) -> None:
    model = load(smollm2)
    plain: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    text = "The capital of France is"
    tokens = model.to_tokens(text)
    expected = plain.generate(tokens, max_new_tokens=N_NEW, do_sample=False, repetition_penalty=1.0)
    out, cache = model.generate(
        text, N_NEW, do_sample=False, names_filter=["blocks.9.hook_resid_post", "pattern9"]
    )
    assert out == model.tokenizer.decode(expected[0], skip_special_tokens=True)
    assert out.startswith(text)
    _, whole = model.run_with_cache(expected, names_filter=["blocks.9.hook_resid_post", "pattern9"])
    scale = whole["resid_post", 9].abs().max()
    assert (cache["resid_post", 9] - whole["resid_post", 9]).abs().max() < 1e-4 * scale
    assert_same(cache["pattern", 9], whole["pattern", 9], "pattern")
    cat, dog = (model.run_with_cache(animal)[1]["resid_post", 14][0, -1] for animal in ("a cat", "a dog"))
    assert_steered(model, plain, model.layers, 4 * (cat - dog), tokens, 14)


def test_texts_are_padded_on_the_left_and_go_on_as_they_do_alone(llama: HookedModel) -> None:
    texts = ["My lord, I came", "to see your father's funeral, and"]
    alone = [greedy(llama, llama.to_tokens(text))[0, -N_NEW:] for text in texts]
    seen: list[Tensor] = []
    with llama.hooks([("hook_embed", lambda value, hook: seen.append(value))]):
        together, cache = llama.generate(
            texts, N_NEW, do_sample=False, stop_at_eos=False, return_type="tokens", names_filter="pattern1"
        )
    assert torch.equal(together[:, -N_NEW:], torch.stack(alone))
    ids, mask = llama.to_tokens_and_mask(texts, padding_side="left")
    assert (cache["pattern", 1][0, :, -1, : int((mask[0] == 0).sum())] == 0).all()
    assert torch.equal(greedy(llama, ids, attention_mask=mask), together)
    with pytest.raises(TokensError, match="pad on the left"):
        greedy(llama, ids.flip(1), attention_mask=mask.flip(1))
    outputs = llama.generate(texts, N_NEW, do_sample=False, stop_at_eos=False)
    assert [text in output for text, output in zip(texts, outputs, strict=True)] == [True, True]
    assert isinstance(llama.generate(texts[0], 2), str)


def test_rows_end_with_eos(llama: HookedModel) -> None:
    tokens = greedy(llama)
    end = int(tokens[0, 9])
    assert end not in tokens[1]
    ended = llama.generate(PROMPT, N_NEW, do_sample=False, eos_token_id=end)
    assert torch.equal(ended[1], tokens[1])
    first = tokens[0].tolist().index(end, 7)
    assert ended[0].tolist() == tokens[0, :first].tolist() + [end] * (7 + N_NEW - first)
    alone, cache = llama.generate(
        PROMPT[:1], N_NEW, do_sample=False, eos_token_id=[end, 299], names_filter=("resid_post", 0)
    )
    assert alone[0].tolist() == tokens[0, : first + 1].tolist()
    assert cache["resid_post", 0].shape[1] == first + 1


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_logits_are_those_of_forwards_before_any_setting(
    tiny_model: TinyModel, family: str, use_cache: bool
) -> None:
    """Rows with padding in front, with an edit at every step, and beside a cache of values."""
    model = load(tiny_model(family))
    ids, mask = model.to_tokens_and_mask(["My lord, I came", "to see"], padding_side="left")
    settings: dict[str, Any] = {"top_k": 3, "temperature": 0.5, "repetition_penalty": 2.0}
    with model.hooks([(("resid_post", 1), lambda value, hook: value * 1.5)]):
        torch.manual_seed(3)
        output, cache = model.generate(
            ids,
            N_NEW,
            attention_mask=mask,
            stop_at_eos=False,
            output_logits=True,
            return_type="str",
            names_filter=("resid_post", 1),
            use_past_kv_cache=use_cache,
            **settings,
        )
        tokens = output.sequences
        whole = torch.cat([mask, mask.new_ones(2, N_NEW)], dim=1)
        logits, kept = model.run_with_cache(tokens, attention_mask=whole, names_filter=("resid_post", 1))
    assert len(output.logits) == N_NEW
    assert output.past_key_values is None
    torch.testing.assert_close(
        torch.stack(output.logits, 1), logits[:, -N_NEW - 1 : -1], atol=1e-4, rtol=1e-4
    )
    real = whole.bool()
    assert_same(cache["resid_post", 1][real], kept["resid_post", 1][real], family)


def test_values_of_steps_without_a_cache_are_not_kept(
    llama: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step has all positions so far, and only those of the last forward are given."""
    sizes: list[int] = []
    keep = Steps._keep

    def counted(self: Steps, name: str, value: Tensor) -> None:
        keep(self, name, value)
        sizes.append(sum(step.shape[1] for step in self._steps.get(name, [])))

    monkeypatch.setattr(Steps, "_keep", counted)
    greedy(llama, use_past_kv_cache=False, names_filter=("resid_post", 0))
    assert max(sizes) == PROMPT.shape[1] + N_NEW


def test_rows_end_with_texts(llama: HookedModel) -> None:
    """As in Hugging Face alone; a row ends with the token that completes a text, also in the middle of the token."""
    texts = ["My lord, I came", "to see your father's funeral, and"]
    ids, mask = llama.to_tokens_and_mask(texts, padding_side="left")
    free = greedy(llama, ids, attention_mask=mask)[:, -N_NEW:]
    words = [llama.tokenizer.decode(row[2:4]) for row in free]
    eos = llama.tokenizer.eos_token_id
    plain: Any = AutoModelForCausalLM.from_pretrained(llama.hf.name_or_path).eval()
    for stop in (words[0], [words[0], words[1][:-1] or words[1]]):
        expected = plain.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=N_NEW,
            do_sample=False,
            stop_strings=stop,
            tokenizer=llama.tokenizer,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        ended = llama.generate(texts, N_NEW, do_sample=False, stop_strings=stop, return_type="tokens")
        assert torch.equal(ended, expected)
        new = ended[0, ids.shape[1] :].tolist()
        n_own = next(n for n in range(1, N_NEW) if words[0] in llama.tokenizer.decode(free[0, :n]))
        assert new == free[0, :n_own].tolist() + [eos] * (len(new) - n_own)
    with pytest.raises(TokensError, match="stop_strings holds ''; give texts that are not empty"):
        llama.generate(PROMPT, stop_strings=[""])
    bare = HookedModel(llama.hf, check=False)
    with pytest.raises(TokensError, match="tokenizer"):
        bare.generate(PROMPT, stop_at_eos=False, stop_strings="x")


def test_settings_of_the_model_do_not_count(tiny_model: TinyModel) -> None:
    model = load(tiny_model("gpt2"))
    expected = greedy(model)
    first = int(expected[0, 7])
    model.hf.generation_config.suppress_tokens = [first]
    model.hf.generation_config.repetition_penalty = 5.0
    assert torch.equal(greedy(model), expected)
    assert model.hf.generation_config.suppress_tokens == [first]
    assert model.hf.generate(PROMPT[:1], max_new_tokens=1, do_sample=False)[0, -1] != first


def test_tokens_are_sampled_as_transformerlens_samples(llama: HookedModel) -> None:
    """The distribution of the next token, as thousands of rows with one prompt show it, is that of its function."""
    from transformer_lens.utilities import sample_logits

    n_rows = 4000
    prompt = torch.tensor([[5, 9, 9, 17, 9, 21]])
    many = prompt.expand(n_rows, -1)
    logits = llama(prompt)[:, -1].expand(n_rows, -1)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.3},
        {"temperature": 0.5, "freq_penalty": 4.0, "top_k": 10},
        {"repetition_penalty": 3.0, "top_k": 10},
    ]
    # A token that is there already must be likely, or penalties would not show.
    favourite = {"fwd_hooks": [("ln_final.hook_normalized", lambda value, hook: value + llama.W_U[:, 9])]}
    with llama.hooks(**favourite):  # type: ignore[arg-type]
        logits = llama(prompt)[:, -1].expand(n_rows, -1)
        for setting in settings:
            torch.manual_seed(0)
            ours = llama.generate(many, 1, stop_at_eos=False, **setting)[:, -1]
            torch.manual_seed(1)
            theirs = sample_logits(logits.clone(), tokens=many, **setting)
            counts = torch.stack([torch.bincount(tokens, minlength=300) for tokens in (ours, theirs)]).float()
            distance = (counts[0] - counts[1]).abs().sum() / n_rows / 2
            assert distance < 0.08 + 0.1 * ((counts.sum(0) > 0).sum() > 50), setting
            torch.testing.assert_close(counts[0, 9], counts[1, 9], atol=0.03 * n_rows, rtol=0)
        zero = llama.generate(PROMPT, N_NEW, temperature=0.0, stop_at_eos=False)
        assert torch.equal(zero, greedy(llama))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 0}, TokensError, "max_new_tokens is 0; choose at least 1"),
        ({"temperature": -1.0}, TokensError, "temperature is -1.0"),
        ({"top_k": 0}, TokensError, "top_k is 0"),
        ({"top_p": 0.0}, TokensError, "top_p is 0.0"),
        ({"max_new_tokens": 122}, TokensError, "a prompt of 7 tokens and 122 new ones are more than the 128"),
        ({"return_type": "logits"}, TokensError, "return_type is 'logits'"),
        ({"padding_side": "right"}, TokensError, "choose 'left'"),
        ({"names_filter": "resid_pots"}, HookError, "matches nothing"),
    ],
)
def test_what_is_refused(llama: HookedModel, arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        llama.generate(PROMPT, **arguments)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_generate(tiny_model: TinyModel, llama: HookedModel) -> None:
    with pytest.raises(ModelError, match="without its head"):
        load(tiny_model("gpt2"), has_head=False).generate(PROMPT)
    with pytest.raises(TokensError, match="no EOS token is known; give eos_token_id"):
        HookedModel(llama.hf, check=False).generate(PROMPT)
    with pytest.raises(HookError, match="runs its own model"):
        llama.run_with_hooks(PROMPT, fwd_hooks=[("hook_embed", lambda value, hook: llama.generate(PROMPT))])
