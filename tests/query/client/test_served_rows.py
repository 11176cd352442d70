"""What a client requests for an index: indices along each axis, in the order in which the values are wanted."""

from typing import Any

import numpy as np
import pytest

from actstore.query.client.served_rows import _inner
from actstore.query.selection import Indices
from actstore.store.reading.row_index import RowIndex

ARRAY = np.arange(6 * 5 * 4 * 3).reshape(6, 5, 4, 3)
NOTHING_TO_ASK = "no text says it, so whole rows are read"


def numbers(rows: Indices) -> list[int]:
    return list(rows) if isinstance(rows, range) else rows.tolist()


@pytest.mark.parametrize(
    "key",
    [
        (slice(1, 4),),
        (slice(1, 4), 2),
        (slice(1, 4), -1, -1, -1),
        (slice(1, 4), slice(None, None, 2), slice(1, 3)),
        (slice(1, 4), slice(4, 1, -1), slice(None, None, 2), 2),
        (slice(1, 4), [3, 0, -1]),
        (slice(1, 4), [True, False, True, False, True], slice(0, 2)),
        (slice(1, 4), slice(None), slice(None, None, -1)),
        (slice(1, 4), slice(None), slice(None), slice(2, None, -1)),
        (slice(1, 4), slice(None), [2, 0]),
    ],
    ids=str,
)
def test_what_is_asked_for_is_what_is_wanted(key: Any) -> None:
    inner = _inner(RowIndex.parse(key, ARRAY.shape), ARRAY.shape)
    is_expressible = not any(
        isinstance(part, list) or (isinstance(part, slice) and (part.step or 1) < 0) for part in key[2:]
    )
    assert (inner is not None) == is_expressible, NOTHING_TO_ASK
    if inner is not None:
        asked = ARRAY[key[0]][np.ix_(range(3), *map(numbers, inner))]
        np.testing.assert_array_equal(asked.reshape(ARRAY[key].shape), ARRAY[key])
