"""Variants with several edits each, from several positions on, are runs with functions on hooks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actstore.hooks.model import HookedModel
from actstore.patching.engine.packed_variants import VariantEdit
from actstore.patching.engine.variants import packed, whole

TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 300, (2, 8), generator=torch.Generator().manual_seed(4))


def metric(logits: Tensor) -> Tensor:
    return logits[:, :, 5].sum(1) - logits[:, -1, 6]


def test_edits_begin_at_positions_of_their_own(tiny_model: TinyModel) -> None:
    model = HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(7)

    def edit(layer: int, leaf: str, head: int | None, start: int, stop: int) -> VariantEdit:
        width = 64 if head is None else 16
        value = torch.randn(2, stop - start, width, generator=generator)
        return VariantEdit(layer, leaf, head, start, value)

    edits = [
        [edit(2, "attn.hook_q", 3, 4, 8)],
        [edit(0, "hook_mlp_out", None, 5, 8), edit(2, "attn.hook_k", 1, 3, 8)],
        [],
        [edit(1, "attn.hook_z", 0, 2, 6), edit(1, "attn.hook_z", 2, 6, 8), edit(0, "attn.hook_v", 0, 7, 8)],
        [edit(1, "hook_resid_mid", None, 7, 8)],  # behind the positions of the first metric
    ]
    for positions in ([3, 6], [7], list(range(8))):
        expected = []
        for its in edits:
            hooks = []
            for one in its:

                def put(value: Tensor, hook: Any, one: VariantEdit = one) -> None:
                    for offset in range(one.value.shape[1]):
                        position = one.start + offset
                        if one.head is None:
                            value[:, position] = one.value[:, offset]
                        else:
                            value[:, position, one.head] = one.value[:, offset]

                hooks.append((f"blocks.{one.layer}.{one.leaf}", put))
            expected.append(metric(model.run_with_hooks(TOKENS, fwd_hooks=hooks)[:, positions]))
        wanted = torch.stack(expected).double()
        for max_tokens in (1, 40, 1000):
            with model.packed_run(TOKENS) as run:
                fast = packed(run, edits, metric, positions, max_tokens=max_tokens)
            slow = whole(model, TOKENS, edits, metric, positions, max_tokens=max_tokens)
            torch.testing.assert_close(fast.numbers, wanted, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(slow.numbers, wanted, atol=1e-4, rtol=1e-5)
            assert fast.noise_floor < 1e-5
            assert fast.n_skipped == (2 if positions == [3, 6] else 1)
            assert torch.equal(fast.numbers[2], fast.corrupted)
    assert (wanted - fast.corrupted).abs().amax(1).topk(4).values.min() > 1e-3
