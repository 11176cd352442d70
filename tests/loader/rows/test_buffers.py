"""Memory of batches is reused, but never while somebody holds it."""

import pytest
import torch

from actstore.loader.rows.buffers import Buffers


def test_memory_that_nobody_holds_is_used_again() -> None:
    buffers = Buffers(8)
    first = buffers.take((10, 4), torch.bfloat16)
    pointer = first.data_ptr()
    del first
    assert buffers.take((10, 4), torch.bfloat16).data_ptr() == pointer
    assert buffers.take((4, 5), torch.float32).data_ptr() == pointer  # of the same size in bytes


def test_what_is_held_is_left_alone() -> None:
    buffers = Buffers(8)
    held = buffers.take((8,), torch.float32)
    view = buffers.take((8,), torch.float32)[2:3]
    pointers = {held.data_ptr(), view.data_ptr() - 8}
    assert buffers.take((8,), torch.float32).data_ptr() not in pointers


def test_what_autograd_holds_is_left_alone() -> None:
    buffers = Buffers(8)
    weight = torch.ones(8, requires_grad=True)
    batch = buffers.take((8,), torch.float32).fill_(3)
    loss = (batch * weight).sum()
    del batch
    buffers.take((8,), torch.float32).fill_(7)
    torch.autograd.backward(loss)
    assert weight.grad is not None
    assert weight.grad.tolist() == [3] * 8


def test_two_sizes_in_turns() -> None:
    buffers = Buffers(8)
    pointers = {buffers.take((8 * (1 + i % 2),), torch.float32).data_ptr() for i in range(40)}
    assert len(pointers) == 2


def test_those_of_a_caller_who_collects_are_not_kept() -> None:
    buffers = Buffers(8)
    held = [buffers.take((100,), torch.float32) for _ in range(50)]
    assert len({tensor.data_ptr() for tensor in held}) == 50
    assert sum(map(len, buffers._memories.values())) <= 8


@pytest.mark.parametrize("nbytes", [1, 100, 4096, 1 << 20])
def test_memory_begins_where_it_is_written_fast(nbytes: int) -> None:
    buffers = Buffers(4)
    taken = [buffers.take((nbytes,), torch.uint8) for _ in range(4)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in taken)
    assert len({tensor.data_ptr() for tensor in taken}) == 4
