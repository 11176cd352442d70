"""Arrays as text: round trips, and texts that are refused."""

import base64
import struct

import numpy as np
import pytest

from actstore.errors import StorageError
from actstore.store.statistics.array_text import decoded, encoded, upper_triangle


def test_arrays_read_back_to_the_last_bit() -> None:
    values = np.array([0.1, -0.0, 5e-324, -1e120])
    text = encoded(values)
    assert base64.b64decode(text) == struct.pack("<4d", *values)
    assert decoded(text, 4, "sum").tobytes() == values.tobytes()
    assert decoded(encoded(np.empty(0)), 0, "sum").size == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it has 0 bytes where 8 were expected"),
        ("AAAAAAAAAAAAAAAA", "it has 12 bytes where 8 were expected"),
        ("AAAAAAAAAA=", "it is not base64"),
        ("AAAAAAAAAAAAAA", "it is not base64"),
        ("AAAAAAAAAA!=", "it is not base64"),
        ("AAAAA\nAAAAA=", "it is not base64"),
        ("AAAAAAAAAÄ=", "it is not base64"),
        ("AAAAAAAAAAB=", "it is not base64 (its last bits are not zero)"),
        (encoded(np.array([np.nan])), "not finite or larger than 1e+120"),
        (encoded(np.array([-np.inf])), "not finite or larger than 1e+120"),
        (encoded(np.array([-1.1e120])), "not finite or larger than 1e+120"),
    ],
)
def test_damage_is_refused(text: str, words: str) -> None:
    with pytest.raises(StorageError) as caught:
        decoded(text, 1, "a.json: sum")
    assert str(caught.value).startswith("a.json: sum is damaged: ")
    assert words in str(caught.value)


def test_upper_triangle_is_row_by_row() -> None:
    matrix = np.arange(9).reshape(3, 3)
    assert matrix[upper_triangle(3)].tolist() == [0, 1, 2, 4, 5, 8]
