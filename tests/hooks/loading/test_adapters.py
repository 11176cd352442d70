"""Adapters beside a model's files, or around a loaded model, with which no values can be right."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import actstore
from actstore.errors import ModelError
from actstore.hooks.model import HookedModel
from tests.commands import command

TinyModel = Callable[..., Path]
BESIDE = (
    r"holds an adapter \(adapter_config.json\) beside the model.*merge_and_unload\(\).*take the adapter away"
)


def around(plain: Any, config: peft.PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for what it has renamed
        return peft.get_peft_model(plain, config).eval()


def plain_model(tiny_model: TinyModel) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()


@pytest.fixture
def with_adapter(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A folder with a model and an adapter for it, as a trainer may leave it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    around(plain_model(tiny_model), config).save_pretrained(folder)
    return folder


def test_an_adapter_beside_the_weights_is_refused(with_adapter: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=BESIDE) as caught:
        HookedModel.from_pretrained(with_adapter, device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=BESIDE):
        actstore.plan(**fields | {"model": str(with_adapter)})
    assert not Path(fields["out"]).exists()
    (with_adapter / "adapter_config.json").unlink()
    HookedModel.from_pretrained(with_adapter, device="cpu")


def test_the_answer_is_the_same_without_peft(with_adapter: Path) -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from transformers.utils import is_peft_available; assert not is_peft_available()\n"
        "from actstore.hooks.model import HookedModel; from actstore.errors import ModelError\n"
        f"try: HookedModel.from_pretrained({str(with_adapter)!r}, device='cpu')\n"
        "except ModelError as error: print(error)"
    )
    done = command(code=code)
    with pytest.raises(ModelError) as caught:
        HookedModel.from_pretrained(with_adapter, device="cpu")
    assert done.stdout == f"{caught.value}\n", done.stderr


def test_a_folder_with_nothing_but_an_adapter(with_adapter: Path) -> None:
    for path in list(with_adapter.iterdir()):
        if not path.name.startswith("adapter"):
            path.unlink()
    assert json.loads((with_adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(ModelError, match=r"holds an adapter .* and no model.*merge_and_unload\(\)"):
        HookedModel.from_pretrained(with_adapter, device="cpu")


@pytest.mark.parametrize("has_model", [True, False])
def test_an_adapter_on_the_hub(has_model: bool, with_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder as the cache of the Hub keeps a downloaded model."""
    home = with_adapter.parent / "hub"
    snapshot = home / "models--some--adapter" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(with_adapter, snapshot)
    if not has_model:
        (snapshot / "config.json").unlink()
    (home / "models--some--adapter" / "refs").mkdir()
    (home / "models--some--adapter" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(home))
    with pytest.raises(ModelError, match=r"some/adapter on the Hub holds an adapter .*merge_and_unload\(\)"):
        HookedModel.from_pretrained("some/adapter", device="cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), r"\(PREFIX_TUNING\)"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), r"\(PROMPT_TUNING\)"),
        (
            peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]),
            r"\(LORA\)",
        ),
    ],
    ids=["prefix", "prompt", "activated"],
)
def test_an_adapter_of_more_than_modules_is_refused(
    tiny_model: TinyModel, config: peft.PeftConfig, message: str
) -> None:
    with pytest.raises(ModelError, match=f"{message} depends on more than the tokens of a position"):
        HookedModel(around(plain_model(tiny_model), config))


class Scaling(peft.PeftModelForCausalLM):
    """A model that changes its output outside of its modules."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = super().forward
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_a_wrapper_that_gives_another_output_is_refused(tiny_model: TinyModel) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = around(plain_model(tiny_model), config)
    HookedModel(model)
    model.__class__ = Scaling
    with pytest.raises(ModelError, match="gives another output than the model in it"):
        HookedModel(model)


def test_an_adapter_that_is_left_in_training_mode(tiny_model: TinyModel) -> None:
    model = plain_model(tiny_model)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    with pytest.raises(ModelError, match=r"layers.0.self_attn.q_proj is in training mode.*call model.eval"):
        HookedModel(model)
    HookedModel(model.eval())


def test_a_model_without_values(tiny_model: TinyModel) -> None:
    config = plain_model(tiny_model).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match="on the device meta.*load them with from_pretrained"):
        HookedModel(model)
