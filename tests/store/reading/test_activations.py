"""One hook of a store as a tensor-like array."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actstore.opening import open_store
from actstore.storage.local import LocalBlobs
from actstore.store.reading.activations import Activations
from tests.store.arrays import bits
from tests.store.example import D_MODEL, HOOKS, LENGTH, N, example_plan, example_values, write_store

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = pytest.mark.parametrize("dtype", TORCH)
KEYS: dict[str, Any] = {
    "all": slice(None),
    "row": 36,
    "list": [36, 0, 17],
    "position": (slice(10, 20), -1),
    "one number": (3, 2, 1),
    "nothing": slice(5, 5),
}


def activations(local: LocalBlobs, dtype: str, hook: str = HOOKS[0]) -> Activations:
    plan = example_plan(dtype)
    write_store(local, plan, example_values(plan), range(3))
    return open_store(local.url)[hook]


def written(local: LocalBlobs, dtype: str) -> Activations:
    """The same, written at the first call only."""
    if local.head("_actstore/runs/0000/plan.json") is None:
        return activations(local, dtype)
    return open_store(local.url)[HOOKS[0]]


def integers(tensor: torch.Tensor) -> Any:
    """The bits of a tensor; NumPy has no bfloat16 to show them in."""
    width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return bits(tensor.contiguous().reshape(-1).view(width).numpy()).reshape(tensor.shape)


@DTYPES
@pytest.mark.parametrize("key", KEYS)
def test_tensors_have_the_stored_bits_and_type(local: LocalBlobs, dtype: str, key: str) -> None:
    acts = activations(local, dtype)
    expected = example_values(example_plan(dtype))[HOOKS[0]][KEYS[key]]
    found = acts[KEYS[key]]
    assert found.dtype == acts.dtype == TORCH[dtype]
    assert found.shape == expected.shape
    np.testing.assert_array_equal(integers(found), bits(expected).reshape(expected.shape))


@DTYPES
def test_numpy_arrays_have_the_stored_bits_and_type(local: LocalBlobs, dtype: str) -> None:
    acts = activations(local, dtype)
    found = acts.numpy()
    assert found.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    np.testing.assert_array_equal(bits(found), bits(example_values(example_plan(dtype))[HOOKS[0]]))
    assert acts.numpy((0, slice(2, 4))).shape == (2, D_MODEL)


def test_shape_and_names(local: LocalBlobs) -> None:
    acts = activations(local, "bfloat16", HOOKS[2])
    assert acts.shape == (N, LENGTH, 2, 8)
    assert acts.axes == ("sequence", "position", "head", "d_head")
    assert len(acts) == N
    plan = example_plan("bfloat16")
    assert acts.nbytes == plan.activations(plan.request.hooks[2]).nbytes
    assert repr(acts) == "<Activations blocks.1.attn.hook_z (37, 8, 2, 8) bfloat16>"


def test_tensors_are_the_callers_own(local: LocalBlobs) -> None:
    acts = activations(local, "float32")
    acts[0:4].zero_()
    assert integers(acts[0:4]).any()


def test_iteration_ends(local: LocalBlobs) -> None:
    assert len(list(iter(activations(local, "float16")))) == N


@DTYPES
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.sampled_from([0.0, 0.05, 0.5, 1.0]), seed=st.integers(0, 2**16))
def test_masks_of_rows_are_those_of_numpy(local: LocalBlobs, dtype: str, share: float, seed: int) -> None:
    acts = written(local, dtype)
    mask = np.random.default_rng(seed).random((N, LENGTH)) < share
    expected = example_values(example_plan(dtype))[HOOKS[0]][mask]
    for found in (acts[mask], acts[torch.from_numpy(mask)], torch.from_numpy(bits(acts.numpy(mask)))):
        assert found.shape == expected.shape
        np.testing.assert_array_equal(integers(found), bits(expected).reshape(expected.shape))


def test_masks_of_another_shape(local: LocalBlobs) -> None:
    acts = activations(local, "float32")
    for shape in ((LENGTH, N), (N, LENGTH + 1)):
        with pytest.raises(IndexError, match=rf"must have shape \({N}, {LENGTH}\)"):
            acts[np.ones(shape, bool)]
    with pytest.raises(IndexError):
        acts[np.ones((N, LENGTH), int)]


def test_page_for_notebooks(local: LocalBlobs) -> None:
    page = activations(local, "bfloat16")._repr_html_()
    assert HOOKS[0] in page
    for axis, size in zip(("sequence", "position", "d_model"), (N, LENGTH, D_MODEL), strict=False):
        assert f">{axis}</td><td style='text-align:left'>{size}<" in page
