"""Models without their later layers: bit for bit what the whole model gives, for every causal type of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actstore.errors import ModelError
from actstore.hooks.model import HookedModel
from tests.hooks.causal_types import CAUSAL_TYPES, N_LAYERS, tiny_config

NOT_BUILT = frozenset(
    {
        "bailing_hybrid",
        "blt",
        "cohere_compass_text",
        "dbrx",
        "dots3_note",
        "dots3_note_text",
        "emu3",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_assistant",
        "gemma4_unified",
        "gemma4_unified_assistant",
        "git",
        "got_ocr2",
        "llama4",
        "longcat_flash",
        "mimo_v2_flash",
        "mllama",
        "moss_transcribe_diarize",
        "musicgen",
        "musicgen_melody",
        "phi4_multimodal",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen4_exp",
        "reformer",
        "xlm",
        "zamba2",
    }
)
"""Types that wrap several models, or whose sizes do not go together when they are small."""
STATES_BEGIN_BEHIND_THE_FIRST_LAYER = ("falcon_mamba", "mamba", "mamba2", "rwkv")
"""Types whose ``hidden_states`` lack the embedding."""
REFUSED = frozenset(
    {
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "cpmant",
        "data2vec-text",
        "deepseek_v4",
        "electra",
        "ernie",
        "gemma3n_text",
        "hrm_text",
        "hy_v4",
        "marian",
        "mbart",
        "megatron-bert",
        "mvp",
        "openai-gpt",
        "pegasus",
        "plbart",
        "prophetnet",
        "qwen4_exp_text",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
    }
)
"""Types that cannot be hooked: encoders, decoders beside another list of layers, and streams of another shape."""
TinyModel = Callable[..., Path]
N_TOKENS = 16


def build(model_type: str) -> Any:
    """A tiny random model of a type, in evaluation mode."""
    for without in (None, "head_dim", "num_key_value_heads"):
        try:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(model_type, without=without)).eval()
            with torch.no_grad():
                model(input_ids=tokens(), use_cache=False)
        except (ValueError, RuntimeError) as error:  # these sizes do not go together
            reason = error
        else:
            return model
    raise reason


def tokens() -> torch.Tensor:
    return (torch.arange(N_TOKENS) * 37 % 190 + 3)[None]


def streams(model: HookedModel) -> list[torch.Tensor]:
    """The values of ``hook_resid_post`` of every layer that is loaded."""
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    values: dict[str, torch.Tensor] = {}
    model.run(tokens(), hooks, lambda hook, value: values.update({hook: value.clone()}))
    return [values[hook] for hook in hooks]


@pytest.mark.parametrize("model_type", [kind for kind in CAUSAL_TYPES if kind not in NOT_BUILT])
def test_first_layers_alone_give_what_the_whole_model_gives(model_type: str, tmp_path: Path) -> None:
    build(model_type).save_pretrained(tmp_path)
    if model_type in REFUSED:
        with pytest.raises(ModelError) as caught:
            HookedModel.from_pretrained(tmp_path, n_layers=N_LAYERS - 1, has_head=False, device="cpu")
        assert "\n" not in str(caught.value)
        return
    first = HookedModel.from_pretrained(tmp_path, n_layers=N_LAYERS - 1, has_head=False, device="cpu")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = whole(input_ids=tokens(), output_hidden_states=True, use_cache=False).hidden_states
    if model_type not in STATES_BEGIN_BEHIND_THE_FIRST_LAYER:
        states = states[1:]
    everything = streams(HookedModel(whole, check=False))
    config: Any = first.base.config
    assert config.num_hidden_layers == len(everything) >= N_LAYERS
    for layer, stream in enumerate(streams(first)):
        assert torch.equal(stream, everything[layer]), layer
        assert torch.equal(stream, states[layer]), layer


def test_weights_of_later_layers_are_not_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Weights of later layers need not even be in the folder."""
    folder = tiny_model("llama")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("model.layers.2.")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    first = HookedModel.from_pretrained(tmp_path, n_layers=2, device="cpu")
    assert type(first.hf).__name__ == "LlamaForCausalLM"
    assert type(first.hf) is type(AutoModelForCausalLM.from_config(first.hf.config))
    assert first.cfg.n_layers == len(first.layers) == 2
    with pytest.raises(ModelError, match=r"lacks .* weights"):
        HookedModel.from_pretrained(tmp_path, device="cpu")


def test_the_number_of_layers_must_be_one_of_the_model(tiny_model: TinyModel) -> None:
    for n_layers in (0, 4):
        with pytest.raises(ModelError, match=f"n_layers is {n_layers}; .* has layers 1 to 3"):
            HookedModel.from_pretrained(tiny_model("llama"), n_layers=n_layers, device="cpu")
