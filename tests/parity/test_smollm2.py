"""A real pretrained model: its stream is bit-equal to plain hooks, and its patterns are those of eager attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actstore.hooks.model import HookedModel

TEXT = "When John and Mary went to the store, Mary gave a bottle to"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_stream_of_every_layer_is_bit_equal(smollm2: Path, dtype: str) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=getattr(torch, dtype)).eval()
    tokens = AutoTokenizer.from_pretrained(smollm2)([TEXT, TEXT[::-1][: len(TEXT)]], padding=True)
    ids = torch.tensor(tokens["input_ids"])
    mask = torch.tensor(tokens["attention_mask"])
    expected: list[torch.Tensor] = []
    for layer in plain.model.layers:
        layer.register_forward_hook(lambda _module, _args, output: expected.append(output.clone()))
    model = HookedModel.from_pretrained(str(smollm2), dtype=dtype, device="cpu")
    for given in (None, mask):
        expected.clear()
        with torch.no_grad():
            positions = None if given is None else (given.cumsum(-1) - 1).clamp(min=0)
            logits = plain(ids, attention_mask=given, position_ids=positions, use_cache=False).logits
        hooked_logits, cache = model.run_with_cache(
            ids, attention_mask=given, names_filter="blocks.*.hook_resid_post"
        )
        assert len(expected) == 30
        for layer, value in enumerate(expected):
            assert torch.equal(cache["resid_post", layer], value), layer
        assert torch.equal(hooked_logits, logits)


def test_patterns_of_every_head_are_those_of_eager_attention(smollm2: Path) -> None:
    eager = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="eager")
    model = HookedModel.from_pretrained(str(smollm2), dtype="float32", device="cpu")
    ids = model.to_tokens(TEXT)
    with torch.no_grad():
        expected = eager.eval()(ids, output_attentions=True).attentions
    _, cache = model.run_with_cache(ids, names_filter="blocks.*.attn.hook_pattern", return_type=None)
    torch.testing.assert_close(cache.stack_activation("pattern"), torch.stack(expected), atol=1e-5, rtol=1e-4)
