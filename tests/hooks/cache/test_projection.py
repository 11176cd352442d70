"""Parts of the stream as products with directions: what multiplying the whole stacks would give."""

from typing import Any

import pytest
import torch
from torch import Tensor

from actstore.demo import MODEL_PATH
from actstore.errors import HookError
from actstore.hooks.cache.activation_cache import ActivationCache
from tests.hooks.test_model import TOKENS, TinyModel, load
from tests.parity.bridge import boot

D_MODEL = 64


@pytest.fixture(params=["gpt2", "llama"], scope="module")
def cache(request: pytest.FixtureRequest, tiny_model: TinyModel) -> ActivationCache:
    model = load(tiny_model(request.param))
    cache = model.run_with_cache(TOKENS)[1]
    assert isinstance(cache, ActivationCache)
    return cache


@pytest.fixture(params=[(D_MODEL,), (D_MODEL, 3), (D_MODEL, 1)], ids=str)
def onto(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(request.param, generator=torch.Generator().manual_seed(4))


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("pos_slice", [None, -1, (1, 4)])
@pytest.mark.parametrize("apply_ln", [False, True])
def test_stacks_of_products(cache: ActivationCache, onto: Tensor, pos_slice: Any, apply_ln: bool) -> None:
    options: dict[str, Any] = {"pos_slice": pos_slice, "apply_ln": apply_ln, "return_labels": True}
    for layer in (0, 2, None):
        for remainder in (False, True):
            given = {**options, "layer": layer, "incl_remainder": remainder}
            stack, labels = cache.stack_neuron_results(**given)
            found, its_labels = cache.stack_neuron_results(**given, project_output_onto=onto)
            near(found, stack @ onto)
            assert its_labels == labels
        for expand in (False, True):
            for mlp_input in {False, layer is not None}:
                given = {**options, "layer": layer, "expand_neurons": expand, "mlp_input": mlp_input}
                stack, labels = cache.get_full_resid_decomposition(**given)
                found, its_labels = cache.get_full_resid_decomposition(**given, project_output_onto=onto)
                near(found, stack @ onto)
                assert its_labels == labels
                assert len(labels) == len(found)


@pytest.mark.parametrize("neurons", [None, 3, [0, 5], (2, 9)])
def test_single_neurons(cache: ActivationCache, onto: Tensor, neurons: Any) -> None:
    whole = cache.get_neuron_results(1, neurons)
    near(cache.get_neuron_results(1, neurons, project_output_onto=onto), whole @ onto)


def test_values_are_those_of_transformerlens() -> None:
    ours = load(MODEL_PATH)
    tokens = ours.to_tokens("My lord, I came to see your father's funeral")
    _, cache = ours.run_with_cache(tokens)
    theirs = boot(MODEL_PATH)
    with torch.no_grad():
        _, bridge_cache = theirs.run_with_cache(tokens)
        onto = theirs.W_U[:, [5, 7]]
        for given in ({}, {"incl_remainder": True}):
            expected = bridge_cache.stack_neuron_results(layer=2, project_output_onto=onto, **given)
            near_bridge(cache.stack_neuron_results(layer=2, project_output_onto=onto, **given), expected)
        expected = bridge_cache.get_full_resid_decomposition(project_output_onto=onto[:, 0])
        near_bridge(cache.get_full_resid_decomposition(project_output_onto=onto[:, 0]), expected)
        stream = bridge_cache.accumulated_resid(layer=-1)
        expected = bridge_cache.apply_ln_to_stack(stream, recompute_ln=True)
        near_bridge(cache.apply_ln_to_stack(cache.accumulated_resid(layer=-1), recompute_ln=True), expected)


def near_bridge(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_what_is_no_direction(cache: ActivationCache) -> None:
    for wrong in (torch.zeros(D_MODEL + 1), torch.zeros(2, D_MODEL), torch.zeros(D_MODEL, 2, 2), "W_U"):
        with pytest.raises(HookError, match=r"give a direction \[64\] or several \[64, n\]"):
            cache.get_neuron_results(1, project_output_onto=wrong)  # type: ignore[arg-type]
