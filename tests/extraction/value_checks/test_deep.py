"""The deep check over a real store: what it computes again is what the worker wrote, and damage is found."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

import actstore
from actstore.extraction.value_checks.deep import DeepCheck, as_tensor, deep_check
from actstore.extraction.value_checks.reference import Reference
from actstore.hooks.model import HookedModel
from actstore.store.reading.segment_tokens import TokenReader

TinyModel = Callable[..., Path]
Change = Callable[[torch.Tensor, int], object]
HOOKS = (
    "blocks.0.ln1.hook_normalized",
    "blocks.0.attn.hook_attn_scores",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_resid_post",
)
STREAM = HOOKS[-1]
LENGTH, BATCH, SEGMENT = 32, 8, 16


@dataclass(frozen=True)
class Extracted:
    """A finished store and its model."""

    store: actstore.Store
    model: HookedModel

    def stored(self, hook: str, rows: Sequence[int]) -> NDArray[Any]:
        return self.store[hook].rows[list(rows)]

    def check(self, rows: Sequence[int], stored: Any = None, model: HookedModel | None = None) -> DeepCheck:
        store = self.store
        return deep_check(
            Reference(model or self.model, "loaded"),
            store.plan,
            rows,
            tokens=TokenReader(store.blobs, store.plan),
            stored=stored or self.stored,
        )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def extracted(
    request: pytest.FixtureRequest, tiny_model: TinyModel, text_file: Path, tmp_path_factory: Any
) -> Extracted:
    folder, out = tiny_model("llama"), tmp_path_factory.mktemp("deep") / "store"
    actstore.extract(
        actstore.plan(
            model=str(folder),
            tokens=str(text_file),
            documents="line",
            packing="document",
            truncate="right",
            hooks=list(HOOKS),
            context_length=LENGTH,
            max_tokens=2400,
            dtype=request.param,
            batch_size=BATCH,
            segment_size=SEGMENT,
            out=str(out),
        )
    )
    model = HookedModel.from_pretrained(folder, dtype=request.param, device="cpu", has_head=False, n_layers=2)
    return Extracted(actstore.open(str(out)), model)


def test_every_row_is_computed_again_bit_for_bit(extracted: Extracted) -> None:
    plan = extracted.store.plan
    lengths = extracted.store.lengths[:]
    assert plan.hook_names == HOOKS
    assert plan.n_sequences % BATCH  # the last batch is filled up
    assert len(set(lengths)) > 5
    result = extracted.check(range(plan.n_sequences))
    assert result.n_rows == result.n_rows_bit_equal == plan.n_sequences
    assert result.largest_errors == dict.fromkeys(HOOKS, 0.0)
    assert result.problems == ()


def test_rows_count_once_and_only_they_are_read(extracted: Extracted) -> None:
    read: set[tuple[str, int]] = set()

    def stored(hook: str, rows: Sequence[int]) -> NDArray[Any]:
        read.update((hook, row) for row in rows)
        return extracted.stored(hook, rows)

    result = extracted.check([33, 2, 33, 70, 34], stored)
    assert result.n_rows == result.n_rows_bit_equal == 4
    assert read == {(hook, row) for hook in HOOKS for row in (2, 33, 34, 70)}
    assert extracted.check([]).n_rows == 0
    for row in (-1, extracted.store.plan.n_sequences):
        with pytest.raises(IndexError, match=f"sequence {row} is out of bounds"):
            extracted.check([0, row])


@pytest.mark.parametrize("hook", HOOKS)
def test_another_row_under_its_number_is_named(extracted: Extracted, hook: str) -> None:
    full = [index for index, length in enumerate(extracted.store.lengths[:]) if length == LENGTH]
    row, other = full[3], full[1]

    def stored(name: str, rows: Sequence[int]) -> NDArray[Any]:
        return extracted.stored(
            name, [other if name == hook and stored_row == row else stored_row for stored_row in rows]
        )

    result = extracted.check([row, row + 1, row + 20], stored)
    assert result.n_rows == 3
    assert result.n_rows_bit_equal == 2
    (problem,) = result.problems
    assert (problem.hook, problem.sequence) == (hook, row)
    assert problem.error == result.largest_errors[hook] > problem.allowed
    assert str(problem).startswith(f"{hook} of sequence {row} is ")


def damaged(extracted: Extracted, row: int, change: Change) -> DeepCheck:
    """Check a row and the next one after changing the stored stream [context_length, d_model] of the first."""
    length = int(extracted.store.lengths[row])

    def stored(hook: str, rows: Sequence[int]) -> NDArray[Any]:
        values = extracted.stored(hook, rows)
        if hook == STREAM and row in rows:
            place = rows.index(row)
            tensor = as_tensor(values[place], extracted.store.plan.request.dtype)
            change(tensor, length)
            values[place] = tensor.view(torch.uint8).numpy().view(values.dtype)
        return values

    return extracted.check([row, row + 1], stored)


def short_row(extracted: Extracted) -> int:
    """A row with padding, inside of a batch whose first row has more or less of it."""
    lengths = extracted.store.lengths[:]
    inside = (row for row in range(64) if 0 < row % BATCH < BATCH - 1)
    return next(row for row in inside if LENGTH > lengths[row] != lengths[row - row % BATCH])


@pytest.mark.parametrize(
    "change",
    [
        lambda values, _length: values.zero_(),
        lambda values, _length: values.copy_(values.roll(1, 0)),
        lambda values, length: values[length - 1].fill_(math.nan),
        lambda values, length: values[length // 2, :16].add_(20.0),
    ],
    ids=["zeros", "shift", "nan", "some values"],
)
def test_changed_values_are_named(extracted: Extracted, change: Change) -> None:
    row = short_row(extracted)
    result = damaged(extracted, row, change)
    assert [(problem.hook, problem.sequence) for problem in result.problems] == [(STREAM, row)]
    assert (result.n_rows, result.n_rows_bit_equal) == (2, 1)


def test_what_rounding_explains_is_counted_and_no_problem(extracted: Extracted) -> None:
    allowed = {"float32": 1e-3, "bfloat16": 1e-1}[extracted.store.plan.request.dtype]
    result = damaged(extracted, 8, lambda values, _length: values.mul_(1 + allowed / 2))
    assert result.problems == ()
    assert (result.n_rows, result.n_rows_bit_equal) == (2, 1)
    assert allowed / 4 < result.largest_errors[STREAM] < allowed


def test_a_change_of_padding_alone_costs_the_row_its_bits(extracted: Extracted) -> None:
    result = damaged(extracted, short_row(extracted), lambda values, length: values[length:].fill_(math.nan))
    assert result.problems == ()
    assert (result.n_rows_bit_equal, result.largest_errors[STREAM]) == (1, 0.0)


def test_another_model_is_found_in_every_row(extracted: Extracted) -> None:
    changed: Any = copy.deepcopy(extracted.model.hf)
    with torch.no_grad():
        changed.layers[1].mlp.down_proj.weight.mul_(-1)
    result = extracted.check([40, 3], model=HookedModel(changed))
    assert [(problem.hook, problem.sequence) for problem in result.problems] == [(STREAM, 3), (STREAM, 40)]
    assert result.n_rows_bit_equal == 0
    assert result.largest_errors == {hook: result.largest_errors[STREAM] * (hook == STREAM) for hook in HOOKS}


def test_another_kernel_gives_other_bits_and_passes(extracted: Extracted) -> None:
    """What an upgrade of torch or another device does to a store."""
    dtype = extracted.store.plan.request.dtype
    folder = extracted.store.plan.request.model.name
    model = HookedModel.from_pretrained(
        folder, dtype=dtype, device="cpu", has_head=False, n_layers=2, attention="eager"
    )
    result = extracted.check(range(16), model=model)
    assert result.problems == ()
    assert result.n_rows_bit_equal < 16
    assert result.largest_errors[STREAM] > 0
