"""The golden check: right values pass, wrong ones are found, and nothing is left on the model."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from actstore.errors import ModelError
from actstore.extraction.value_checks import golden as module
from actstore.extraction.value_checks.golden import (
    compute_expected,
    golden,
    recompute,
    recompute_alone,
    sampled_row,
)
from actstore.extraction.value_checks.reference import Reference
from actstore.hooks.model import HookedModel
from actstore.hooks.naming.hook_points import point_of
from actstore.store.format.plan import Segment

TinyModel = Callable[..., Path]
Loaded = Callable[..., HookedModel]
BATCH, LENGTH, ROW, REAL = 8, 24, 5, 17
"""The row that is checked, and the number of its real tokens."""
FAMILIES = (
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "llama",
    "opt",
    "phi",
    "phi3",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "qwen2_moe",
)
"""One family for each entry in the table; other families share it."""
NARROW = [(family, dtype) for family in ("llama", "mixtral") for dtype in ("bfloat16", "float16")]
CASES = [*((family, "float32") for family in FAMILIES), *NARROW, ("gemma3_text", "bfloat16")]
KINDS = (
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_resid_post",
    "blocks.2.hook_resid_post",
    "blocks.1.hook_resid_mid",
    "blocks.1.ln1.hook_normalized",
    "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_rot_k",
    "blocks.1.attn.hook_attn_scores",
    "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_z",
    "blocks.1.mlp.hook_post",
    "blocks.1.hook_mlp_out",
)


def load(folder: Path, dtype: str = "float32", **options: Any) -> HookedModel:
    return HookedModel.from_pretrained(folder, dtype=dtype, device="cpu", has_head=False, **options)


@pytest.fixture(scope="module")
def loaded(tiny_model: TinyModel) -> Loaded:
    """A function that loads a model by family and dtype, once."""
    return cache(lambda family, dtype="float32": load(tiny_model(family), dtype))


def some_tokens() -> NDArray[np.int32]:
    """Token ids [BATCH, LENGTH], with rows of different lengths and padding."""
    tokens = np.random.default_rng(0).integers(2, 300, (BATCH, LENGTH)).astype(np.int32)
    for row in range(BATCH):
        tokens[row, REAL - ROW + row :] = 1
    return tokens


def storable(model: HookedModel) -> list[str]:
    points = {name: point_of(name) for name in model.names}
    return [name for name, point in points.items() if point is not None and point.why_not_stored is None]


def captured(
    model: HookedModel, hooks: list[str], tokens: NDArray[np.int32] | None = None
) -> dict[str, Tensor]:
    """The values that a worker captures of a batch, [BATCH, LENGTH, *shape]."""
    batch = some_tokens() if tokens is None else tokens
    values: dict[str, Tensor] = {}

    def take(hook: str, value: Tensor) -> None:
        values[hook] = (
            value.transpose(1, 2).clone() if hook.endswith(("scores", "pattern")) else value.clone()
        )

    model.run(torch.from_numpy(batch).long(), hooks, take)
    return values


def one_row(values: Mapping[str, Tensor], row: int = ROW) -> dict[str, Tensor]:
    return {hook: value[row] for hook, value in values.items()}


def check(model: HookedModel, row: Mapping[str, Tensor]) -> dict[str, float]:
    of_row = compute_expected(Reference(model, "loaded"), some_tokens(), ROW, REAL, list(row))
    record = golden(of_row, row, sequence=105)
    assert (record.sequence, record.reference) == (105, "loaded")
    return record.errors


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_every_hook_passes(loaded: Loaded, family: str, dtype: str) -> None:
    model = loaded(family, dtype)
    hooks = storable(model)
    errors = check(model, one_row(captured(model, hooks)))
    assert list(errors) == hooks
    assert max(errors.values()) < {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}[dtype]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_a_row_is_right_whatever_batch_it_was_in(loaded: Loaded, family: str, dtype: str) -> None:
    """The row has other last bits when captured in half of the batch."""
    model = loaded(family, dtype)
    hooks = storable(model)
    halves = captured(model, hooks, some_tokens()[ROW - 1 :])
    check(model, one_row(halves, 1))


@pytest.fixture(scope="module")
def llama(loaded: Loaded) -> HookedModel:
    return loaded("llama")


@pytest.fixture(scope="module")
def batch(llama: HookedModel) -> dict[str, Tensor]:
    return captured(llama, storable(llama))


@pytest.mark.parametrize("fault", ["row", "shift", "zero", "nan"])
@pytest.mark.parametrize("hook", KINDS)
def test_one_wrong_hook_is_named(llama: HookedModel, batch: dict[str, Tensor], hook: str, fault: str) -> None:
    row = one_row(batch)
    wrong = {
        "row": batch[hook][ROW - 1],
        "shift": row[hook].roll(1, 0),
        "zero": torch.zeros_like(row[hook]),
        "nan": row[hook].clone().index_fill_(0, torch.tensor([REAL - 1]), torch.nan),
    }[fault]
    with pytest.raises(
        ModelError,
        match=f"^{hook} of sequence 105 was captured .* away at position .* float32; the segment was",
    ):
        check(llama, {"hook_embed": row["hook_embed"], hook: wrong})


@pytest.mark.parametrize("hook", [hook for hook in KINDS if hook.startswith("blocks.1.")])
def test_a_hook_of_another_layer_is_found(llama: HookedModel, batch: dict[str, Tensor], hook: str) -> None:
    other = batch[hook.replace("blocks.1.", "blocks.2.")][ROW]
    with pytest.raises(ModelError, match=hook):
        check(llama, {hook: other})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("hook", KINDS)
def test_tolerances_of_narrow_types_hide_no_other_row(loaded: Loaded, hook: str, dtype: str) -> None:
    model = loaded("llama", dtype)
    with pytest.raises(ModelError, match=f"{hook} of sequence 105 .* is allowed in {dtype}"):
        check(model, one_row(captured(model, [hook]), ROW - 1))


def test_what_stands_at_padding_does_not_count(llama: HookedModel, batch: dict[str, Tensor]) -> None:
    row = {hook: value.clone() for hook, value in one_row(batch).items()}
    expected = check(llama, row)
    for value in row.values():
        value[REAL:] = torch.nan
    assert check(llama, row) == expected


def test_a_real_position_that_sees_padding_is_found(llama: HookedModel, batch: dict[str, Tensor]) -> None:
    for hook, unseen in (("blocks.0.attn.hook_attn_scores", 0.0), ("blocks.0.attn.hook_pattern", 0.5)):
        row = batch[hook][ROW].clone()
        row[REAL - 1, :, REAL] = unseen
        with pytest.raises(ModelError, match=hook):
            check(llama, {hook: row})


def test_one_changed_weight_is_found(llama: HookedModel, batch: dict[str, Tensor]) -> None:
    changed: Any = copy.deepcopy(llama.hf)
    with torch.no_grad():
        changed.layers[1].mlp.down_proj.weight[3, 7] += 1.0
    other = HookedModel(changed)
    row = one_row(batch)
    assert check(other, {"blocks.0.hook_resid_post": row["blocks.0.hook_resid_post"]})
    with pytest.raises(ModelError, match="blocks.1.hook_mlp_out"):
        check(other, {hook: row[hook] for hook in ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")})


def test_what_modules_show_is_had_without_our_taps(
    llama: HookedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr(llama, "run", fail)
    monkeypatch.setattr("actstore.hooks.capture.forward.tapped", fail)
    ours = ("hook_scale", "hook_normalized", "hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")
    hooks = [hook for hook in batch if not hook.endswith(ours)]
    assert len(hooks) == 3 * 14 + 1
    check(llama, {hook: batch[hook][ROW] for hook in hooks})


def test_the_last_stream_of_a_model_that_is_cut_off_is_not_normed(tiny_model: TinyModel) -> None:
    model = load(tiny_model("gpt2"), n_layers=2)
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    errors = check(model, one_row(captured(model, hooks)))
    assert list(errors) == hooks


def test_a_family_without_an_entry_has_its_streams_checked() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model("olmo2", vocab_size=300, pad_token_id=None, **shape)
    model = HookedModel(AutoModelForCausalLM.from_config(config).eval())
    values = captured(model, list(model.names))
    assert max(check(model, one_row(values)).values()) < 1e-5
    for hook in model.names:
        with pytest.raises(ModelError, match=hook):
            check(model, {hook: values[hook][ROW + 1]})


def test_rotations_that_depend_on_the_length_are_no_false_alarm(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond 20 positions this model rotates otherwise; the row has 24, of which 17 are real."""
    rotation = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 20,
    }
    model = load(tiny_model("phi3", rope_parameters=rotation, original_max_position_embeddings=20))
    row = one_row(captured(model, storable(model)))
    assert max(check(model, row).values()) < 1e-5
    monkeypatch.setattr(module, "is_length_in_rotation", lambda _config: False)
    with pytest.raises(ModelError, match="blocks.0.attn.hook_rot_q"):
        check(model, row)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_model(llama: HookedModel, batch: dict[str, Tensor], fails: bool) -> None:
    if fails:
        handle = llama.layers[2].register_forward_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            check(llama, one_row(batch))
        handle.remove()
    else:
        check(llama, one_row(batch))
    for submodule in llama.base.modules():
        assert not submodule._forward_hooks
        assert not submodule._forward_pre_hooks
    again = captured(llama, list(batch))
    assert all(torch.equal(again[hook], value) for hook, value in batch.items())


def _fail(_module: nn.Module, _args: Any, _output: Any) -> None:
    raise RuntimeError("on purpose")


def test_values_are_as_long_as_the_row_is_real(llama: HookedModel) -> None:
    reference = Reference(llama, "loaded")
    alone = recompute_alone(reference, some_tokens()[ROW], REAL, list(KINDS))
    assert alone["blocks.1.hook_resid_post"].shape == (REAL, 64)
    assert alone["blocks.1.attn.hook_pattern"].shape == (REAL, 4, LENGTH)
    rows = recompute(reference, some_tokens(), [ROW, 0], list(KINDS))
    assert rows["blocks.1.hook_resid_post"].shape == (2, LENGTH, 64)
    assert rows["blocks.1.attn.hook_pattern"].shape == (2, LENGTH, 4, LENGTH)


def test_the_sampled_row_is_one_of_the_segment_and_the_same_everywhere() -> None:
    segments = [Segment(index, 16 * index, 16 * index + 16) for index in range(200)]
    rows = [sampled_row("ab" * 32, segment) for segment in segments]
    assert all(segment.start <= row < segment.stop for segment, row in zip(segments, rows, strict=True))
    assert {row % 16 for row in rows} == set(range(16))
    assert rows != [sampled_row("cd" * 32, segment) for segment in segments]
    assert sampled_row("ab" * 32, Segment(3, 48, 49)) == 48
    assert rows[:4] == [0, 22, 41, 52]
