"""Arguments of TransformerLens when a model is loaded."""

import inspect
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer

from actstore.demo import MODEL_PATH
from actstore.errors import ModelError
from actstore.hooks.loading.transformer_lens_options import TransformerLensOptions
from actstore.hooks.model import HookedModel

load = HookedModel.from_pretrained


def test_every_argument_of_transformerlens_is_known() -> None:
    theirs = inspect.signature(HookedTransformer.from_pretrained).parameters.keys()
    ours = inspect.signature(load).parameters.keys() | TransformerLensOptions.__annotations__.keys()
    assert theirs - ours <= {"model_name", "from_pretrained_kwargs"}


def test_what_is_honoured() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    model = load(
        MODEL_PATH,
        torch_dtype=torch.bfloat16,
        default_prepend_bos=False,
        first_n_layers=2,
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        n_devices=1,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=None,
        fold_value_biases=False,
        default_padding_side="right",
        hf_model=None,
    )
    assert model.cfg.dtype == torch.bfloat16
    assert model.cfg.n_layers == 2
    assert model.tokenizer is tokenizer
    assert model.to_tokens("My lord").shape == (1, 2)
    same = HookedModel.from_pretrained_no_processing(MODEL_PATH, dtype=torch.bfloat16, n_layers=2)
    assert torch.equal(same.W_Q, model.W_Q)
    assert load(MODEL_PATH, move_to_device=False).cfg.device == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold_ln": True}, "fold_ln is not offered, since weights stay as the model has them"),
        ({"center_unembed": True}, "center_unembed is not offered"),
        ({"refactor_factored_attn_matrices": True}, "refactor_factored_attn_matrices is not offered"),
        ({"hf_model": "a model"}, r"is wrapped by HookedModel\(hf_model, tokenizer\)"),
        ({"checkpoint_index": 3}, "checkpoints are revisions"),
        ({"n_devices": 2}, "spread the model with device_map"),
        ({"default_padding_side": "both"}, "choose 'left' or 'right'"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype and dtype are the same"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(MODEL_PATH, **options)
    assert "\n" not in str(caught.value)


def test_what_nobody_knows() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'fold_everything'"):
        load(MODEL_PATH, fold_everything=True)  # type: ignore[call-arg]
