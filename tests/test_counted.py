"""Numbers of things, as people write them."""

import pytest

from actstore.counted import counted


@pytest.mark.parametrize(
    ("n", "expected"),
    [(0, "0 segments"), (1, "1 segment"), (2, "2 segments"), (1000, "1,000 segments")],
    ids=str,
)
def test_only_one_is_singular(n: int, expected: str) -> None:
    assert counted(n, "segment") == expected


def test_other_plurals() -> None:
    assert (counted(1, "batch", "batches"), counted(2, "batch", "batches")) == ("1 batch", "2 batches")
