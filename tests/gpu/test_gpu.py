"""Extraction on a GPU: pinned buffers and the copy stream give what the plain forward gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import actstore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_rows_are_bit_equal_to_the_plain_forward_on_the_gpu(
    fields: dict[str, Any], dtype: str
) -> None:
    actstore.extract(actstore.plan(**fields, dtype=dtype), device="cuda")
    store = actstore.open(fields["out"])
    model = AutoModelForCausalLM.from_pretrained(fields["model"], dtype=getattr(torch, dtype)).cuda().eval()
    size = store.plan.request.batch_size
    for start in (0, 48):
        tokens = torch.from_numpy(store.tokens[start : start + size]).long().cuda()
        with torch.inference_mode():
            states = model(tokens, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            assert torch.equal(store["resid_post", layer][start : start + size], states[layer + 1].cpu())


def test_two_runs_on_the_gpu_give_the_same_bytes(fields: dict[str, Any], tmp_path: Path) -> None:
    stores = []
    for name in ("a", "b"):
        actstore.extract(actstore.plan(**fields | {"out": str(tmp_path / name)}), device="cuda")
        stores.append(actstore.open(str(tmp_path / name)))
    for hook in stores[0].hooks:
        assert torch.equal(stores[0][hook][:], stores[1][hook][:])
