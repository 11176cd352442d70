"""Taking rows in other amounts than the blocks they come in."""

from collections.abc import Iterator

import numpy as np
import pytest

from actstore.tokens import Rows, RowStream


def blocks(sizes: list[int]) -> Iterator[Rows]:
    """Blocks of these sizes with rows that are numbered consecutively."""
    first = 0
    for size in sizes:
        numbers = np.arange(first, first + size, dtype=np.int32)[:, None]
        yield Rows(numbers, numbers[:, 0], numbers.astype(np.int64), numbers, numbers[:, 0])
        first += size


def numbers_of(rows: Iterator[Rows]) -> list[int]:
    return [int(number) for block in rows for number in block.lengths]


@pytest.mark.parametrize("sizes", [[10], [1] * 10, [3, 4, 3], [4, 6]])
@pytest.mark.parametrize("taken", [(0, 10), (3, 4), (4, 3), (1, 1, 1), (10, 5), (7,)])
def test_each_row_comes_once_and_in_order(sizes: list[int], taken: tuple[int, ...]) -> None:
    stream = RowStream(blocks(sizes))
    numbers = [numbers_of(stream.take(n_rows)) for n_rows in taken]
    rest = numbers_of(stream.rest())
    assert [number for part in numbers for number in part] + rest == list(range(10))
    assert len(numbers[0]) == min(taken[0], 10)
    assert numbers_of(stream.rest()) == []
