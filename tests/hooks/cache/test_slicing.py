"""Slices as objects, ours and those of TransformerLens."""

from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.utilities import Slice as Theirs

from actstore.demo import MODEL_PATH
from actstore.hooks.cache.slicing import Slice
from actstore.hooks.model import HookedModel

GIVEN: list[Any] = [
    None,
    2,
    -1,
    (1, 4),
    (3,),
    (0, 5, 2),
    (None, None),
    [0, 3],
    slice(1, 3),
    np.array([1, 2]),
    torch.tensor([2, 0]),
]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_a_slice_does_what_that_of_transformerlens_does(given: Any) -> None:
    value = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    ours, theirs = Slice(given), Theirs(given)
    for dim in (0, 1, -1):
        assert torch.equal(ours.apply(value, dim), theirs.apply(value, dim))
    assert ours.mode == theirs.mode
    assert repr(ours) == repr(theirs)
    assert ours.indices(5).tolist() == np.atleast_1d(theirs.indices(5)).tolist()
    assert torch.equal(Slice.unwrap(given).apply(value), Theirs.unwrap(given).apply(value))
    assert Slice.unwrap(ours) is ours


def test_what_is_no_slice() -> None:
    for kind in (Slice, Theirs):
        with pytest.raises(ValueError, match="Invalid input_slice"):
            kind("a")
        with pytest.raises(ValueError, match="max_ctx must be"):
            kind([1]).indices()


@pytest.mark.parametrize("kind", [Slice, Theirs])
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_caches_take_slices(kind: type, given: Any) -> None:
    model = HookedModel.from_pretrained(MODEL_PATH)
    _, cache = model.run_with_cache("My lord, I came to see your father")
    for stack in (cache.decompose_resid, cache.stack_head_results):
        assert torch.equal(stack(pos_slice=kind(given)), stack(pos_slice=given))
    parts = cache.decompose_resid(pos_slice=given)
    assert torch.equal(
        cache.logit_attrs(parts, " lord", pos_slice=kind(given)),
        cache.logit_attrs(parts, " lord", pos_slice=given),
    )
    neurons = cache.get_neuron_results(1, neuron_slice=kind(given), pos_slice=(0, 2))
    assert torch.equal(neurons, cache.get_neuron_results(1, neuron_slice=given, pos_slice=(0, 2)))
    _, sliced = model.run_with_cache("My lord, I came to see your father", pos_slice=kind(given))
    assert torch.equal(sliced["z", 1], Slice(given).apply(cache["z", 1], dim=1))
