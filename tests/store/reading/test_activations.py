"""One hook of a store as a tensor-like array."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

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
